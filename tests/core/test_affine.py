import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepquant.core.affine import affine_from_range, dequantize, fake_quantize, quantize

values = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40)


def plain_quantize(x: float, scale: float, zero_point: int, bits: int) -> int:
    """The definition, one number at a time; Python's round is half to even too."""
    inverse = torch.tensor(1.0) / torch.tensor(scale)
    steps = float(torch.tensor(x) * inverse)
    return min(max(round(steps) + zero_point, 0), 2**bits - 1)


@given(values, st.integers(2, 8), st.floats(2**-10, 10, width=32))
@settings(max_examples=100, deadline=None)
def test_codes_match_the_definition(numbers, bits, scale):
    zero_point = (1 << bits) // 3
    codes = quantize(torch.tensor(numbers), torch.tensor(scale), torch.tensor(float(zero_point)), bits)
    assert codes.tolist() == [plain_quantize(x, scale, zero_point, bits) for x in numbers]


def test_ties_round_to_even():
    codes = quantize(torch.tensor([0.5, 1.5, 2.5, -0.5]), torch.tensor(1.0), torch.tensor(2.0), 4)
    assert codes.tolist() == [2, 4, 4, 2]


@given(values, st.integers(2, 8), st.booleans())
@settings(max_examples=100, deadline=None)
def test_error_is_at_most_half_a_step_and_zero_is_exact(numbers, bits, symmetric):
    x = torch.tensor(numbers)
    scale, zero_point = affine_from_range(x.min(), x.max(), bits, symmetric=symmetric)
    rounded = fake_quantize(x, scale, zero_point, bits)
    # The asymmetric zero point is rounded too, which can cost the ends another half step.
    most = float(scale) * (0.5 if symmetric else 1.0) * (1 + 1e-5) + 1e-30
    assert (rounded - x).abs().max() <= most
    assert fake_quantize(torch.zeros(1), scale, zero_point, bits).item() == 0


@given(values, st.integers(2, 8))
@settings(max_examples=50, deadline=None)
def test_quantization_is_idempotent(numbers, bits):
    x = torch.tensor(numbers)
    scale, zero_point = affine_from_range(x.min(), x.max(), bits)
    codes = quantize(x, scale, zero_point, bits)
    assert torch.equal(quantize(dequantize(codes, scale, zero_point), scale, zero_point, bits), codes)


def test_symmetric_grid_is_centered_and_covers_both_ends():
    scale, zero_point = affine_from_range(torch.tensor([-1.0, -0.1]), torch.tensor([0.5, 2.0]), 8, symmetric=True)
    assert zero_point.tolist() == [128, 128]
    assert scale[0].item() == pytest.approx(1 / 128)
    assert scale[1].item() == pytest.approx(2 / 127)


def test_constant_tensor_has_positive_scale():
    scale, zero_point = affine_from_range(torch.zeros(3), torch.zeros(3), 8)
    assert bool((scale > 0).all()) and math.isfinite(float(fake_quantize(torch.zeros(3), scale, zero_point, 8).sum()))
