"""Convolutions over any number of dimensions, transposed ones included, against torch and integer sums."""

from __future__ import annotations

from itertools import product

import diffusers
import pytest
import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.layers import wrap
from stepquant.calibration.float32 import computing_in_float32
from stepquant.calibration.smoothing import best_smoothing
from stepquant.config import QuantSpec
from stepquant.core.affine import quantize
from stepquant.core.gptq import input_rows, row_step
from stepquant.integrations.weight_only import quantize_weights
from stepquant.layers.clock import StepClock
from stepquant.layers.conv import QuantizedConv
from stepquant.layers.install import Quantization, install
from stepquant.layers.quantized import can_quantize, quantized_modules
from stepquant.runtime import prepare, summary

SIZE = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}
CASES = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), 1),
    "conv1d of groups": (lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2, groups=2), 1),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), 2),
    "conv3d": (lambda: nn.Conv3d(4, 6, (3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1)), 3),
    "conv3d of patches": (lambda: nn.Conv3d(4, 6, (1, 2, 2), stride=(1, 2, 2)), 3),
    "conv3d over time": (lambda: nn.Conv3d(4, 6, (3, 1, 1), padding=(1, 0, 0), bias=False), 3),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), 1),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False), 2),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, (1, 2, 3), stride=(1, 2, 1), dilation=(1, 1, 2)), 3),
}


def integer_sums(x: Tensor, weight: Tensor, layer: nn.Module, size: tuple[int, ...]) -> Tensor:
    """Convolve int64 x [B, in, *] with int64 weight [out, in / groups, *kernel], tap by tap: [B, out, *size]."""
    total = torch.zeros(len(x), len(weight), *size, dtype=torch.int64)
    groups = layer.groups
    for tap in product(*map(range, weight.shape[2:])):
        for group in range(groups):
            rows = slice(group * len(weight) // groups, (group + 1) * len(weight) // groups)
            part = x.chunk(groups, dim=1)[group]
            for place in product(*map(range, size)):
                geometry = zip(place, tap, layer.stride, layer.padding, layer.dilation, strict=True)
                if layer.transposed:
                    shifted = [(at + pad - index * gap, step) for at, index, step, pad, gap in geometry]
                    source = [offset // step if offset % step == 0 else -1 for offset, step in shifted]
                else:
                    source = [at * step + index * gap - pad for at, index, step, pad, gap in geometry]
                if all(0 <= at < length for at, length in zip(source, x.shape[2:], strict=True)):
                    taken = part[(slice(None), slice(None), *source)]
                    total[(slice(None), rows, *place)] += taken @ weight[(rows, slice(None), *tap)].t()
    return total


def calibrated(layer: nn.Module, x: Tensor, bits: int = 8, smooth: bool = False):
    point = wrap(layer, bits, 8, StepClock())
    if smooth:
        point.smooth(torch.linspace(0.5, 2, 4))
    point.input_point.observe()
    point(x)
    point.input_point.calibrate("minmax")
    return point


@pytest.fixture(params=CASES)
def case(request) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, dims = CASES[request.param]
    return build().requires_grad_(False), torch.randn(2, 4, *SIZE[dims])


@torch.no_grad()
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_of_the_reference(case, bits):
    layer, x = case
    point = calibrated(layer, x, bits)
    model = nn.Sequential(layer)
    stored = point.to_quantized()
    install(model, Quantization(torch.zeros(1), {"0": stored}))
    prepare(model, "reference")
    expected = layer(x)
    produced = model(x)
    assert produced.shape == expected.shape and stored.weight.codes.shape[:2] == (6, 4 // layer.groups)
    scale, zero_point = stored.input.scale[0, 0, 0], stored.input.zero_point[0, 0, 0]
    codes = quantize(x, scale, zero_point.float(), 8).long() - zero_point.long()
    weight = stored.weight.codes.long() - stored.weight.grid.zero_point.reshape(-1, *(1,) * (x.dim() - 1)).long()
    total = integer_sums(codes, weight, layer, expected.shape[2:])
    along = (1, -1, *(1,) * (x.dim() - 2))
    oracle = total.double() * scale.double() * stored.weight.grid.scale.double().reshape(along)
    if layer.bias is not None:
        oracle = oracle + layer.bias.double().reshape(along)
    assert torch.equal(model[0].kernel.accumulators(x, torch.tensor(0))[0].long(), total)
    torch.testing.assert_close(produced.double(), oracle, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(point(x), produced, atol=1e-5, rtol=1e-5)
    assert (produced - expected).norm() < (0.02 if bits == 8 else 0.2) * expected.norm()


@torch.no_grad()
def test_looks_like_the_layer(case):
    layer, x = case
    model = nn.Sequential(layer)
    quantize_weights(model, QuantSpec.parse("w8a16"))
    module = model[0]
    assert isinstance(module, QuantizedConv)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "transposed"):
        assert getattr(module, name) == getattr(layer, name), name
    assert module.weight.shape == layer.weight.shape
    assert (module.weight - layer.weight).abs().max() < 0.01 * layer.weight.abs().max()
    prepare(model)
    assert "1 floating point" in summary(model)
    assert (model(x) - layer(x)).norm() < 0.01 * layer(x).norm()


@torch.no_grad()
def test_smoothing(case):
    layer, x = case
    if layer.groups > 1:
        pytest.skip("grouped convolutions are not smoothed")
    point = calibrated(layer, x, 8, smooth=True)
    model = nn.Sequential(layer)
    install(model, Quantization(torch.zeros(1), {"0": point.to_quantized()}))
    prepare(model, "reference")
    assert (model(x) - layer(x)).norm() < 0.03 * layer(x).norm()
    assert (model[0].weight - layer.weight).abs().max() < 0.03 * layer.weight.abs().max()
    columns = (x * torch.tensor([0.01, 1, 1, 20]).reshape(1, -1, *(1,) * (x.dim() - 2))).movedim(1, 0).flatten(1)
    factors = best_smoothing(calibrated(layer, x, 4), columns)
    assert factors is not None and factors.shape == (4,)


@torch.no_grad()
def test_rows_that_gptq_multiplies(case):
    layer, x = case
    if layer.groups > 1 or layer.transposed:
        pytest.skip("rounded to nearest")
    rows = input_rows(x, layer)
    expected = layer(x)
    bias = torch.zeros(6) if layer.bias is None else layer.bias
    produced = rows @ layer.weight.flatten(1).t() + bias
    torch.testing.assert_close(produced, expected.movedim(1, -1).reshape(-1, 6), atol=1e-5, rtol=1e-5)
    assert len(input_rows(x, layer, 2)) < len(rows) and row_step(2, x, layer) == 1


@torch.no_grad()
def test_half_precision_weights_in_float32(case):
    layer, x = case
    expected = layer(x)
    model = nn.Sequential(nn.Linear(1, 1), layer).half()
    wide = computing_in_float32(model)
    assert wide[1].weight.dtype == torch.float16 and can_quantize(wide[1])
    torch.testing.assert_close(wide[1](x), expected, atol=1e-2, rtol=1e-2)


def test_subclasses_that_compute_something_else_stay():
    """The causal convolution of Wan's autoencoder pads time on one side, in a forward of its own."""
    causal = diffusers.models.autoencoders.autoencoder_kl_wan.WanCausalConv3d(2, 2, 3, padding=1)
    assert not can_quantize(causal)
    assert not can_quantize(nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate"))
    assert not can_quantize(nn.ConvTranspose2d(4, 4, 2, groups=2))


@torch.no_grad()
def test_patches_of_a_video():
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    call = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
    }  # fmt: skip
    expected = model(**call).sample
    quantize_weights(model, QuantSpec.parse("w8a16"))
    assert "patch_embedding" in quantized_modules(model)
    prepare(model)
    assert (model(**call).sample - expected).norm() < 0.02 * expected.norm()
