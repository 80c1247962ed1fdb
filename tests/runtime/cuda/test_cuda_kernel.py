"""CUDA kernels against the reference, on a GPU if available, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.core.affine import quantize
from stepquant.layers.quantized import QuantizedModule
from stepquant.runtime import cuda
from stepquant.runtime.cuda.kernel import MIDDLE, CudaKernel
from stepquant.runtime.native.norms import Norm
from stepquant.runtime.reference import ReferenceKernel
from tests.runtime.test_runtimes import CONVOLUTIONS, SPLITS, STEPS, convolution, linear

pytestmark = pytest.mark.skipif(cuda.supported() is not None, reason=str(cuda.supported()))

GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = {"one step": torch.tensor(2), "mixed steps": torch.tensor([0, 2])}
BITS = [(8, 8), (4, 8), (3, 5)]
GROUPED = dict(inputs=6, outputs=8, kernel=3, padding=1, groups=2)


def on_gpu(module: QuantizedModule) -> CudaKernel:
    return CudaKernel(module).to(GPU)


def run(module: QuantizedModule, x: Tensor, row: Tensor, **fused) -> Tensor:
    """The kernel's output for x, on the CPU."""
    return on_gpu(module).run(x.to(GPU), row.to(GPU), **fused).cpu()


def on(norm: Norm) -> Norm:
    return Norm(norm.multiply.to(GPU), norm.add.to(GPU))


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Equal to float32 rounding of the largest output."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", [*CONVOLUTIONS, "groups"])
def test_accumulators_of_convolutions_are_exact(name, row, bits):
    """With scales of 1 the output is the accumulator, an integer that float32 holds."""
    shape = (CONVOLUTIONS | {"groups": GROUPED})[name]
    module = convolution(**shape, bits=bits, bias=False)
    module.weight_scale.fill_(1.0)
    module.input_scale.fill_(1.0)
    x = torch.randint(-300, 300, (2, module.in_channels, 7, 5)).float()
    (sums,) = ReferenceKernel(module).accumulators(x, row)
    assert 0 < float(sums.abs().max()) < 1 << 24
    assert torch.equal(run(module, x, row), sums)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("split", SPLITS)
def test_kernel_returns_its_weight(split, bits):
    for module in (convolution(7, 6, (3, 2), split=SPLITS[split], bits=bits), linear(split=SPLITS[split], bits=bits)):
        assert torch.equal(on_gpu(module).integers().cpu(), module.layer().weight.integers())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("shape", [(2, 7), (2, 37, 7), (2, 3, 2, 75)])
def test_accumulators_of_linears_are_exact(shape, row, bits):
    module = linear(shape[-1], 21, bits=bits, bias=False)
    module.weight_scale.fill_(1.0)
    module.input_scale.fill_(1.0)
    x = torch.randint(-300, 300, shape).float()
    (sums,) = ReferenceKernel(module).accumulators(x, row)
    assert 0 < float(sums.abs().max()) < 1 << 24
    assert torch.equal(run(module, x, row), sums)


def test_large_accumulators_are_exact():
    """Beyond 2^24, where float32 would round the sum as it grows."""
    module = linear(700, 1, bias=False)
    module.weight_packed.fill_(255)
    module.weight_scale.fill_(1.0)
    module.input_scale.fill_(1.0)
    module.input_zero_point.fill_(255)
    x = torch.full((1, 700), -255.0)
    x[0, 0] = -254.0
    exact = -127 * (255 * 700 - 1)
    assert run(module, x, torch.tensor(0)).item() == float(torch.tensor(exact, dtype=torch.float32))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_split_and_smoothed_channels(split, layout):
    module = convolution(7, 6, 3, padding=1, split=SPLITS[split], smoothed=True)
    x, row = torch.randn(2, 7, 6, 5).to(memory_format=layout), torch.tensor([1, 0])
    assert_close(run(module, x, row), ReferenceKernel(module)(x, row))
    module = linear(split=SPLITS[split], bits=(4, 4), smoothed=True)
    x = torch.randn(2, 3, 7)
    assert_close(run(module, x, row), ReferenceKernel(module)(x, row))


@pytest.mark.parametrize("bits", [3, 8])
def test_codes_match_the_definition(bits):
    """Including ties and values far off the grid."""
    module = linear(bits=(8, bits))
    module.input_scale.fill_(0.25)
    kernel = on_gpu(module)
    x = torch.cat([torch.arange(-1000, 1000) * 0.125, torch.randn(1000), torch.tensor([1e9, -1e9, 1e30, -torch.inf])])
    for step in range(STEPS):
        expected = quantize(x, module.input_scale[step, 0, 0], module.input_zero_point[step, 0, 0], bits)
        row = torch.tensor([step], device=GPU)
        found, invalid = torch.ops.stepquant.quantize(
            x[None, None].to(GPU), row, kernel.scale, kernel.zero_point, 0, bits, None, None, None, False
        )
        assert torch.equal(found[0, 0].cpu().float() + MIDDLE, expected) and invalid.tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_everything_fused(dtype):
    """Equal up to rounding, except for few codes at a tie, off by one code."""
    channels, outputs = 19, 6
    module, row = convolution(channels, outputs, 3, padding=1), torch.tensor([2, 0])
    x = torch.randn(2, channels, 5, 4).to(dtype)
    norm = Norm(torch.rand(2, channels) + 0.5, torch.randn(2, channels))
    added, residual = torch.randn(2, outputs), torch.randn(2, outputs, 10, 8)
    plain = F.silu(x.float() * norm.multiply[..., None, None] + norm.add[..., None, None])
    plain = F.interpolate(plain, scale_factor=2.0)
    expected = (ReferenceKernel(module)(plain, row) + added[..., None, None] + residual) * 0.5
    found = run(
        module, x, row, norm=on(norm), activation="silu", upsample=2,
        channel_add=added.to(GPU), residual=residual.to(GPU), factor=0.5, dtype=torch.float32,
    )  # fmt: skip
    assert found.is_contiguous(memory_format=torch.channels_last)
    error = (found - expected).abs()
    assert (error > 1e-5 * expected.abs().max()).float().mean() < 0.01
    assert error.max() <= float(module.input_scale.max() * module.weight_scale.max()) * 128


def test_everything_fused_with_channel_groups():
    """Channel groups are summed in float32 before anything is added."""
    module = convolution(7, 6, 3, padding=1, split=((2, 5), (3, 4)))
    x, row, added = torch.randn(2, 7, 5, 5), torch.tensor([0, 2]), torch.randn(2, 6)
    norm = Norm(torch.rand(2, 7) + 0.5, torch.randn(2, 7))
    residual = torch.randn(2, 6, 5, 5).half()
    plain = x * norm.multiply[..., None, None] + norm.add[..., None, None]
    expected = (ReferenceKernel(module)(plain, row) + added[..., None, None] + residual.float()) * 2
    found = run(module, x, row, norm=on(norm), channel_add=added.to(GPU), residual=residual.to(GPU), factor=2.0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_linear_with_norm_and_residual():
    module = linear(7, 5, bits=(4, 8))
    x, residual, row = torch.randn(2, 9, 7), torch.randn(2, 9, 5), torch.tensor(1)
    norm = Norm(torch.rand(2, 7) + 0.5, torch.randn(2, 7))
    expected = ReferenceKernel(module)(x * norm.multiply[:, None] + norm.add[:, None], row) + residual
    found = run(module, x, row, norm=on(norm), residual=residual.to(GPU))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_padding_of_a_downsampler():
    module = convolution(6, 5, 3, stride=2)
    x, row = torch.randn(2, 6, 7, 8), torch.tensor(1)
    assert_close(run(module, x, row, extra=1), ReferenceKernel(module)(F.pad(x, (0, 1, 0, 1)), row))


@pytest.mark.parametrize("shape", [(2, 12, 9, 7), (1, 96, 16, 5), (3, 40, 72)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm(shape, dtype):
    image = len(shape) == 4
    channels = shape[1] if image else shape[2]
    norm = nn.GroupNorm(4, channels, eps=0.5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(shape) * 3 + 5).to(dtype)
    found = on_gpu(linear()).group_norm(x.to(GPU), norm.to(GPU).requires_grad_(False))
    norm.cpu()
    first = x.float() if image else x.float().transpose(1, 2)
    spread = (...,) + (None,) * (first.dim() - 2)
    multiply, add = found.multiply.cpu()[spread], found.add.cpu()[spread]
    torch.testing.assert_close(first * multiply + add, norm(first), atol=2e-5, rtol=2e-5)


def test_group_norm_is_float32_under_another_default_dtype():
    kernel, norm, x = (
        on_gpu(linear()),
        nn.GroupNorm(4, 8).to(GPU).requires_grad_(False),
        torch.randn(1, 8, 3, 3).to(GPU),
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = kernel.group_norm(x, norm)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.multiply.dtype == found.add.dtype == torch.float32
    expected = kernel.group_norm(x, norm)
    assert torch.equal(found.multiply, expected.multiply) and torch.equal(found.add, expected.add)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_has_the_dtype_of_the_input(dtype):
    module, row = linear(), torch.tensor(1)
    x = torch.randn(3, 7).to(dtype)
    y = run(module, x, row)
    assert y.dtype == dtype
    # The interpreter truncates float32 to bfloat16; a GPU rounds.
    expected = ReferenceKernel(module)(x.float(), row)
    torch.testing.assert_close(y.float(), expected, atol=0, rtol=torch.finfo(dtype).eps)


def test_empty_batch():
    assert run(linear(), torch.randn(0, 7), torch.tensor(0)).shape == (0, 5)
    assert run(convolution(4, 3, 3), torch.randn(0, 4, 5, 5), torch.tensor(0)).shape == (0, 3, 3, 3)
