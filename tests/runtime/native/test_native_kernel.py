"""Layers and the operations fused into them, against torch and against integer arithmetic."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stepquant.errors import StepquantError
from stepquant.runtime.native import kernel as kernel_module
from stepquant.runtime.native.build import available
from stepquant.runtime.native.kernel import NativeKernel
from stepquant.runtime.native.norms import Norm, group_norm, layer_norm
from stepquant.runtime.reference import ReferenceKernel
from tests.runtime.test_runtimes import CONVOLUTIONS, SPLITS, check, convolution, linear

pytestmark = pytest.mark.usefixtures("kernels")


def assert_same_up_to_ties(found, expected, *, step):
    """Equal to float rounding, except for a few codes at ties, which differ by one code."""
    error = (found - expected).abs()
    assert (error > 1e-4 * expected.abs().max()).float().mean() < 0.01
    assert error.max() <= step


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    module = convolution(**CONVOLUTIONS[name])
    check(module, torch.randn(4, module.in_channels, 9, 7), torch.tensor([0, 2, 1, 2]))


@pytest.mark.parametrize("split", SPLITS)
def test_split_channels(split):
    check(convolution(7, 6, 3, padding=1, split=SPLITS[split]), torch.randn(3, 7, 6, 5), torch.tensor([1, 0, 1]))
    check(linear(split=SPLITS[split], smoothed=True), torch.randn(4, 5, 7), torch.tensor([2, 2, 0, 1]))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packed_weights(bits):
    module, row, x = linear(50, 70, bits=(bits, 8)), torch.tensor([1, 0]), torch.randn(2, 9, 50)
    packed = NativeKernel(module, packed=True)
    assert torch.equal(packed(x, row), NativeKernel(module)(x, row))
    assert torch.equal(packed.integers(), module.layer().weight.integers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("row", [torch.tensor(1), torch.tensor([2, 0, 1])], ids=["one step", "mixed steps"])
@pytest.mark.parametrize("shape", [(19, 6, 9, 7), (32, 40, 16, 16), (64, 33, 5, 33)])
def test_everything_fused(shape, row, dtype):
    channels, outputs, height, width = shape
    module = convolution(channels, outputs, 3, padding=1)
    x = torch.randn(3, channels, height, width).to(dtype)
    norm = Norm(torch.rand(3, channels) + 0.5, torch.randn(3, channels))
    added, residual = torch.randn(3, outputs), torch.randn(3, outputs, 2 * height, 2 * width)
    residual = residual.to(memory_format=torch.channels_last)
    plain = F.silu(x.float() * norm.multiply[..., None, None] + norm.add[..., None, None])
    plain = F.interpolate(plain, scale_factor=2.0)
    expected = (ReferenceKernel(module)(plain, row) + added[..., None, None] + residual) * 0.5
    worth = float(module.input_scale.max() * module.weight_scale.max()) * 128
    for instructions in available():
        found = NativeKernel(module, instructions=instructions).run(
            x,
            row,
            norm=norm,
            activation="silu",
            upsample=2,
            channel_add=added,
            residual=residual,
            factor=0.5,
            dtype=torch.float32,
        )
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert_same_up_to_ties(found, expected, step=worth)


def strided(x):
    """The same, every other of twice as many samples."""
    return torch.stack([x, torch.zeros_like(x)], dim=1).flatten(0, 1)[::2]


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "strided": strided,
    "expanded": lambda x: x[:1].expand(x.shape),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("image", [False, True])
def test_residual_of_any_layout(layout, image):
    module, row = (convolution(4, 6, 1), torch.tensor(1)) if image else (linear(7, 6), torch.tensor(1))
    x, residual = (
        (torch.randn(2, 4, 3, 5), torch.randn(2, 6, 3, 5)) if image else (torch.randn(2, 9, 7), torch.randn(2, 9, 6))
    )
    if image:
        residual = residual.to(memory_format=torch.channels_last)
    residual = LAYOUTS[layout](residual)
    expected = ReferenceKernel(module)(x, row) + residual
    torch.testing.assert_close(NativeKernel(module).run(x, row, residual=residual), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm_of_any_layout(layout):
    """Including images whose rows are not adjacent in memory."""
    norm = nn.GroupNorm(2, 8)
    x = torch.randn(2, 8, 6, 10).to(memory_format=torch.channels_last)
    for image in (LAYOUTS[layout](x), x[:, :, ::2], x[..., ::2], x[..., 1:4], x[:, :, :1], x[..., :1]):
        found = group_norm(image, norm)
        y = image * found.multiply[..., None, None] + found.add[..., None, None]
        torch.testing.assert_close(y, norm(image).detach(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (32, 32)])
def test_padding_of_a_downsampler(size):
    module = convolution(6, 5, 3, stride=2)
    x, row = torch.randn(2, 6, *size), torch.tensor(1)
    expected = ReferenceKernel(module)(F.pad(x, (0, 1, 0, 1)), row)
    torch.testing.assert_close(NativeKernel(module).run(x, row, extra=1), expected, atol=1e-5, rtol=1e-5)


def test_pieces_with_everything():
    """The products of channel groups are summed in float32 before anything else is added."""
    module = convolution(7, 6, 3, padding=1, split=((2, 5), (3, 4)))
    x, row, added = torch.randn(2, 7, 5, 5), torch.tensor([0, 2]), torch.randn(2, 6)
    norm = Norm(torch.rand(2, 7) + 0.5, torch.randn(2, 7))
    residual = torch.randn(2, 6, 5, 5).half().to(memory_format=torch.channels_last)
    plain = x * norm.multiply[..., None, None] + norm.add[..., None, None]
    expected = (ReferenceKernel(module)(plain, row) + added[..., None, None] + residual.float()) * 2
    found = NativeKernel(module).run(x, row, norm=norm, channel_add=added, residual=residual, factor=2.0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_linear_with_norm_and_residual():
    module = linear(7, 5)
    x, residual = torch.randn(2, 9, 7), torch.randn(2, 9, 5)
    norm = Norm(torch.rand(2, 7) + 0.5, torch.randn(2, 7))
    expected = ReferenceKernel(module)(x * norm.multiply[:, None] + norm.add[:, None], torch.tensor(0)) + residual
    found = NativeKernel(module).run(x, torch.tensor(0), norm=norm, residual=residual)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(2, 12, 9, 7), (1, 96, 16, 16), (3, 40, 72)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_group_norm(shape, dtype):
    image = len(shape) == 4
    channels = shape[1] if image else shape[2]
    norm = nn.GroupNorm(4, channels, eps=1e-5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(shape) * 3 + 5).to(dtype)
    found = group_norm(x, norm)
    first = x.float() if image else x.float().transpose(1, 2)
    spread = (...,) + (None,) * (first.dim() - 2)
    torch.testing.assert_close(
        first * found.multiply[spread] + found.add[spread], norm(first).detach(), atol=2e-5, rtol=2e-5
    )


@pytest.mark.parametrize("default", ["dtype", "device"])
def test_other_defaults_of_torch(default):
    module, row = convolution(8, 5, 3, padding=1), torch.tensor(1)
    plain, norm = nn.GroupNorm(2, 8, affine=False), nn.GroupNorm(2, 8)
    x = torch.randn(1, 8, 6, 6)

    def results():
        norms = [group_norm(x, one) for one in (plain, norm)]
        return [*norms[0][:2], *norms[1][:2], NativeKernel(module).run(x, row, norm=norms[1], activation="silu")]

    expected = results()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16 if default == "dtype" else before)
        with torch.device("cpu" if default == "dtype" else "meta"):
            found = results()
    finally:
        torch.set_default_dtype(before)
    for one, wanted in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, wanted)


def test_empty_batch():
    assert NativeKernel(linear(7, 5))(torch.randn(0, 7), torch.tensor(0)).shape == (0, 5)


def test_values_beyond_every_code():
    module = linear(7, 5)
    x = torch.tensor([[1e30, -1e30, 3e9, -3e9, 0.0, 65504.0, -65504.0]])
    torch.testing.assert_close(
        NativeKernel(module)(x, torch.tensor(1)), ReferenceKernel(module)(x, torch.tensor(1)), atol=1e-5, rtol=1e-5
    )


GIVEN = {
    "few channels": (torch.randn(2, 4, 6, 6), "shape .2, 4, 6, 6.; expected 8 channels"),
    "many channels": (torch.randn(2, 9, 6, 6), "shape .2, 9, 6, 6.; expected 8 channels"),
    "no batch": (torch.randn(8, 6, 6), "shape .8, 6, 6.; expected"),
    "no memory": (torch.empty(2, 8, 6, 6, device="meta"), "an input on meta"),
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("normalized", [False, True])
def test_image_that_does_not_fit(given, normalized):
    x, message = GIVEN[given]
    kernel = NativeKernel(convolution(8, 5, 3, padding=1))
    with pytest.raises(StepquantError, match=message):
        if normalized:
            group_norm(x, nn.GroupNorm(4, 8))
        else:
            kernel(x, torch.tensor(1))


@pytest.mark.parametrize("activation", [None, "geglu"])
def test_tokens_that_do_not_fit(activation):
    with pytest.raises(StepquantError, match=f"expected {7 if activation is None else 14} channels"):
        NativeKernel(linear(7, 5)).run(torch.randn(2, 3, 10), torch.tensor(1), activation=activation)
    with pytest.raises(StepquantError, match="an input on meta"):
        NativeKernel(linear(7, 5))(torch.empty(2, 7, device="meta"), torch.tensor(1))
    with pytest.raises(StepquantError, match=r"expected \[B, ..., in\]"):
        NativeKernel(linear(7, 5))(torch.randn(7), torch.tensor([0, 2]))


ARGUMENTS = {
    "scale of a normalization": dict(norm=Norm(torch.ones(3, 6), torch.zeros(3, 6))),
    "shift of a normalization": dict(norm=Norm(torch.ones(1, 7), torch.zeros(3, 7))),
    "dtype of a normalization": dict(norm=Norm(torch.ones(3, 7).double(), torch.zeros(3, 7))),
    "layout of a normalization": dict(norm=Norm(torch.ones(7, 3).t(), torch.zeros(3, 7))),
    "device of a normalization": dict(norm=Norm(torch.ones(3, 7, device="meta"), torch.zeros(3, 7))),
    "batch of added channels": dict(channel_add=torch.ones(2, 5)),
    "channels of added channels": dict(channel_add=torch.ones(3, 4)),
    "dtype of added channels": dict(channel_add=torch.ones(3, 5).half()),
    "layout of added channels": dict(channel_add=torch.ones(5, 3).t()),
    "channels of a gate": dict(gate=torch.ones(1, 6)),
    "dimensions of a gate": dict(gate=torch.ones(5)),
    "shape of a residual": dict(residual=torch.ones(3, 4, 4)),
    "batch of a residual": dict(residual=torch.ones(1, 4, 5)),
    "device of a residual": dict(residual=torch.ones(3, 4, 5, device="meta")),
    "unknown activation": dict(activation="relu"),
    "activation after a layer normalization": dict(
        norm=Norm(torch.ones(1, 7), torch.zeros(1, 7), 1e-5), activation="silu"
    ),
    "gelu after a normalization": dict(norm=Norm(torch.ones(1, 7), torch.zeros(1, 7)), activation="gelu"),
    "three times the size": dict(upsample=3),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_do_not_fit(name):
    kernel, x = NativeKernel(linear(7, 5)), torch.randn(3, 4, 7)
    with pytest.raises(StepquantError, match="expected"):
        kernel.run(x, torch.tensor(1), **ARGUMENTS[name])


def test_layer_normalization_of_channel_groups():
    kernel = NativeKernel(linear(7, 5, split=((2, 5), (3, 4))))
    with pytest.raises(StepquantError, match="expected one group"):
        kernel.run(torch.randn(3, 7), torch.tensor(1), norm=Norm(torch.ones(1, 7), torch.zeros(1, 7), 1e-5))


def test_image_smaller_than_the_window():
    with pytest.raises(StepquantError, match=r"shape \[1, 4, 2, 9\]; expected one as large as its window"):
        NativeKernel(convolution(4, 5, 3))(torch.randn(1, 4, 2, 9), torch.tensor(0))


@pytest.mark.parametrize("change", ["weight", "bias"])
def test_parameters_of_a_normalization_that_do_not_fit(change):
    for norm in (nn.GroupNorm(2, 8), nn.LayerNorm(8)):
        setattr(norm, change, nn.Parameter(torch.ones(6)))
        with pytest.raises(StepquantError, match=rf"the {change} of a normalization is \[6\] on cpu; expected \[8\]"):
            layer_norm(norm) if isinstance(norm, nn.LayerNorm) else group_norm(torch.randn(1, 8, 4, 4), norm)


@pytest.mark.parametrize("row", [torch.tensor(3), torch.tensor([0, 1, 3]), torch.tensor(-1)])
def test_row_that_the_table_does_not_have(row):
    with pytest.raises(StepquantError, match=r"the clock is at row (3|-1); expected one of the 3 rows"):
        NativeKernel(linear(7, 5))(torch.randn(3, 7), row)


def test_vectors_of_one_sample_apply_to_all():
    """A gate and an added tensor [1, out] apply to every sample; a normalization of another batch is an error."""
    kernel, row, x = NativeKernel(linear(7, 5)), torch.tensor(1), torch.randn(3, 4, 7)
    added, gate = torch.randn(1, 5), torch.randn(1, 5)
    expected = (kernel(x, row) + added[:, None]) * gate[:, None]
    torch.testing.assert_close(kernel.run(x, row, channel_add=added, gate=gate), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(StepquantError, match=r"float32 \[2, 7\]; expected contiguous float32 \[3, 7\]"):
        kernel.run(x, row, norm=Norm(torch.ones(2, 7), torch.zeros(2, 7)))


@pytest.mark.parametrize("image", [False, True])
def test_residual_in_float64(image):
    module, row = (convolution(4, 6, 1), torch.tensor(1)) if image else (linear(7, 6), torch.tensor(1))
    x = torch.randn(2, 4, 3, 5) if image else torch.randn(2, 9, 7)
    y = NativeKernel(module)(x, row)
    found = NativeKernel(module).run(x.double(), row, residual=torch.ones_like(y).double())
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), y + 1, atol=1e-5, rtol=1e-5)


def test_number_of_plans_is_limited(monkeypatch):
    monkeypatch.setattr(kernel_module, "MOST_PLANS", 6)
    kernel, row = NativeKernel(convolution(4, 6, 3, padding=1)), torch.tensor(1)
    images = [torch.randn(batch, 4, 5, 5) for batch in range(1, 9)]
    expected, kept = [], []
    for x in images:
        expected.append(kernel(x, row))
        kept.append([plan.shape[0] for plan in kernel.plans.values()])
    assert kept == [list(range(max(1, last - 5), last + 1)) for last in range(1, 9)]
    assert torch.equal(kernel(images[0], row), expected[0])
    assert [plan.shape[0] for plan in kernel.plans.values()] == [4, 5, 6, 7, 8, 1]
