from itertools import pairwise

import pytest
import torch
from torch import nn

from stepquant.core import gptq as core_gptq
from stepquant.core.gptq import (
    MOST_INPUTS,
    MOST_ROWS,
    aligned_weight,
    gptq_weight,
    input_rows,
    row_step,
    split_inputs,
)


def grid(weight, bits):
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return scale.expand_as(weight), (-low / scale).round().expand_as(weight)


def rounded(weight, scale, zero_point, bits):
    return ((weight / scale).round() + zero_point).clamp(0, 2**bits - 1).sub(zero_point) * scale


def case(seed=0, inputs=24, outputs=10, rows=400):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator)
    x = torch.randn(rows, inputs, generator=generator) @ mix  # correlated inputs: something to compensate with
    return torch.randn(outputs, inputs, generator=generator), x


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gptq_beats_rounding_to_nearest(bits, seed):
    weight, x = case(seed)
    scale, zero_point = grid(weight, bits)
    gptq = gptq_weight(weight, x.t() @ x, scale, zero_point, bits)

    def error(candidate):
        return float(((rounded(candidate, scale, zero_point, bits) - weight) @ x.t()).square().sum())

    assert error(gptq) < 0.7 * error(weight)


@pytest.mark.parametrize("columns", [4, 64])
def test_gptq_matches_textbook_algorithm(columns, monkeypatch):
    """Against the textbook form: eliminate one input at a time from the inverse of the moments."""
    monkeypatch.setattr(core_gptq, "COLUMNS", columns)  # 6 inputs are two panels, or one
    weight, x = case(inputs=6, outputs=3)
    scale, zero_point = grid(weight, 3)
    moments = x.t() @ x
    expected, remaining = weight.double().clone(), weight.double().clone()
    left = moments.diagonal().argsort(descending=True).tolist()
    damped = moments.double() + 0.01 * moments.diagonal().mean().double() * torch.eye(6, dtype=torch.float64)
    while left:
        inverse = torch.linalg.inv(damped[left][:, left])
        column = left[0]
        expected[:, column] = remaining[:, column]
        code = rounded(remaining[:, column], scale[:, column].double(), zero_point[:, column].double(), 3)
        error = (remaining[:, column] - code) / inverse[0, 0]
        remaining[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    result = gptq_weight(weight, moments, scale, zero_point, 3)
    assert torch.allclose(result, expected.float(), atol=1e-4)


def test_inputs_that_are_always_zero():
    weight, x = case()
    x[:, 5] = 0
    scale, zero_point = grid(weight, 4)
    result = gptq_weight(weight, x.t() @ x, scale, zero_point, 4)
    assert torch.isfinite(result).all()
    assert torch.equal(result[:, 5], weight[:, 5])


def test_alignment_inverts_a_linear_change_of_the_input():
    weight, x = case(rows=4000)
    changed = x * 0.5  # a gain lost on the way
    aligned = aligned_weight(weight, changed.t() @ changed, x.t() @ changed)
    before, after = (
        float((candidate @ changed.t() - weight @ x.t()).square().sum()) for candidate in (weight, aligned)
    )
    assert after < 0.2 * before
    assert torch.allclose(aligned_weight(weight, x.t() @ x, x.t() @ x), weight, atol=1e-4)


@pytest.mark.parametrize("stride, padding, dilation", [(1, 1, 1), (2, 0, 1), (1, 2, 2)])
def test_input_rows_times_flat_weight_equals_layer(stride, padding, dilation):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, stride, padding, dilation, bias=False)
    x = torch.randn(2, 3, 9, 9)
    expected = conv(x).flatten(2).transpose(1, 2).reshape(-1, 5)
    assert torch.allclose(input_rows(x, conv) @ conv.weight.flatten(1).t(), expected, atol=1e-5)
    linear = nn.Linear(4, 6, bias=False)
    x = torch.randn(2, 7, 4)
    assert torch.allclose(input_rows(x, linear) @ linear.weight.t(), linear(x).reshape(-1, 6), atol=1e-6)


def test_large_images_are_subsampled_evenly():
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)
    x = torch.randn(2, 2, 8, 8)
    every = input_rows(x, conv).reshape(2, 8, 8, -1)
    assert torch.equal(input_rows(x, conv, 3).reshape(2, 3, 3, -1), every[:, ::3, ::3])
    assert row_step(2, x, conv) == 1
    samples = 40 * MOST_ROWS // 64
    step = row_step(samples, x, conv)
    assert 0.5 * MOST_ROWS < samples * (64 / step**2) <= MOST_ROWS
    assert row_step(7 * MOST_ROWS, torch.randn(1, 1, 2), nn.Linear(2, 2)) == 7


@pytest.mark.parametrize("channels, taps, count", [(512, 9, 1), (2560, 9, 5), (1280, 9, 3), (5120, 1, 2), (999, 25, 6)])
def test_wide_layers_are_split_between_channels(channels, taps, count):
    parts = split_inputs(channels, taps)
    assert len(parts) == count and parts[0].start == 0 and parts[-1].stop == channels * taps
    assert all(one.stop == other.start for one, other in pairwise(parts))
    assert all(part.start % taps == 0 and part.stop - part.start <= MOST_INPUTS for part in parts)


def test_a_layer_whose_inputs_are_all_zero_keeps_its_weight():
    weight = torch.randn(3, 4)
    assert torch.equal(aligned_weight(weight, torch.zeros(4, 4), torch.zeros(4, 4)), weight)
