"""NaN in an activation reaches the output, as in the reference runtime, and so the watcher of `pipelines.overflow`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepquant.errors import StepquantError
from stepquant.pipelines.overflow import watched
from stepquant.runtime import prepare
from stepquant.runtime.native.attention import NativeAttention
from stepquant.runtime.native.build import available
from stepquant.runtime.native.kernel import NativeKernel
from stepquant.runtime.native.norms import Norm, group_norm, layer_norm
from stepquant.runtime.native.recording import Recording
from stepquant.runtime.reference import ReferenceKernel
from tests.runtime.native.test_native_attention import processor
from tests.runtime.native.test_native_replay import recorded, runs, static_unet  # noqa: F401
from tests.runtime.test_runtimes import convolution, linear

pytestmark = pytest.mark.usefixtures("kernels")

ROWS = pytest.mark.parametrize("row", [torch.tensor(1), torch.tensor([2, 0, 1])], ids=["one step", "mixed steps"])
LAYERS = {
    "plain": {},
    "smoothed": {"smoothed": True},
    "groups": {"split": ((2, 5), (3, 4))},
    "4 bits": {"bits": (4, 8)},
}


def assert_nan_as(found, expected, x, module, run):
    """NaN wherever the reference has it; samples without NaN have the values that they have in another batch."""
    assert bool(found.isnan()[expected.isnan()].all())
    assert found.isnan().flatten(1).any(1).tolist() == x.isnan().flatten(1).any(1).tolist()
    clean = run(module, x.nan_to_num())
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


@ROWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_convolution(name, dtype, row):
    module = convolution(7, 40, 3, padding=1, **LAYERS[name])
    x = torch.randn(3, 7, 5, 6).to(dtype)
    x[1, 4, 3, 2] = torch.nan
    expected = ReferenceKernel(module)(x, row)
    assert 0 < int(expected.isnan().sum()) < expected[1].numel()
    for instructions in available():
        kernel = NativeKernel(module, instructions=instructions, packed=name == "4 bits")
        found = kernel(x, row)
        assert found.dtype == dtype
        assert_nan_as(found, expected, x, kernel, lambda kernel, x: kernel(x, row))


@pytest.mark.parametrize("name", LAYERS)
def test_linear(name):
    module, row, x = linear(**LAYERS[name]), torch.tensor(1), torch.randn(3, 7)
    x[1, 2] = torch.nan
    kernel, expected = NativeKernel(module), ReferenceKernel(module)(x, row)
    assert bool(kernel(x, row).isnan()[expected.isnan()].all())
    assert bool(kernel(x.nan_to_num(), row).isfinite().all()), "of an earlier call"


@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh", "geglu"])
def test_activation(activation):
    x = torch.randn(3, 4, 14 if activation == "geglu" else 7)
    for place in (2, -1):
        one = x.clone()
        one[1, 2, place] = torch.nan
        assert bool(NativeKernel(linear(7, 5)).run(one, torch.tensor(1), activation=activation).isnan()[1, 2].all())


@ROWS
def test_everything_fused(row):
    """NaN in the input, the residual, the normalization, what is added to channels, and the gate."""
    kernel = NativeKernel(convolution(7, 6, 3, padding=1))
    x, residual = torch.randn(3, 7, 4, 4), torch.randn(3, 6, 8, 8).to(memory_format=torch.channels_last)
    arguments = {
        "x": x,
        "norm": (torch.rand(3, 7) + 0.5),
        "channel_add": torch.randn(3, 6),
        "gate": torch.randn(3, 6),
        "residual": residual,
    }
    for name in arguments:
        given = {other: value.clone(memory_format=torch.preserve_format) for other, value in arguments.items()}
        given[name][1, 3] = torch.nan
        norm = Norm(given.pop("norm"), torch.randn(3, 7))
        found = kernel.run(given.pop("x"), row, norm=norm, activation="silu", upsample=2, factor=0.5, **given)
        assert found.isnan().flatten(1).any(1).tolist() == [False, True, False], name


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("image", [True, False])
def test_normalization(value, image):
    """Infinity has no mean either."""
    if image:
        x, module, norm = torch.randn(2, 8, 4, 4), convolution(8, 5, 3, padding=1), nn.GroupNorm(2, 8)
    else:
        x, module, norm = torch.randn(2, 3, 8), linear(8, 5), nn.LayerNorm(8)
    x[1, 2, 3] = value
    fused = group_norm(x, norm) if image else layer_norm(norm)
    with torch.no_grad():
        expected = ReferenceKernel(module)(norm(x), torch.tensor(1))
        found = NativeKernel(module).run(x, torch.tensor(1), norm=fused)
    assert bool(found.isnan()[expected.isnan()].all())
    assert bool(expected.isnan().any())


@ROWS
@pytest.mark.parametrize("operand", ["query", "key", "value", "mask"])
def test_attention(operand, row):
    simulated = processor()
    simulated.clock.row = row
    generator = torch.Generator().manual_seed(0)
    operands = {
        "query": torch.randn(3, 2, 37, 8, generator=generator),
        "key": torch.randn(3, 2, 5, 8, generator=generator),
        "value": torch.randn(3, 2, 5, 8, generator=generator),
        "mask": torch.randn(3, 2, 37, 5, generator=generator),
    }
    clean_operands = [x.clone() for x in operands.values()]
    operands[operand][1, 0, 3, 2] = torch.nan
    expected = simulated.attend(*operands.values())
    for instructions in available():
        found = NativeAttention(simulated, instructions=instructions)(*operands.values(), row)
        assert bool(found.isnan()[expected.isnan()].all())
        whole = expected.isnan().any(-1)  # a query's channels are NaN together
        assert torch.equal(found.isnan().all(-1), whole)
        clean = NativeAttention(simulated, instructions=instructions)(*clean_operands, row)
        assert torch.equal(found[~whole], clean[~whole])


@torch.no_grad()
def test_watcher_of_a_recorded_denoiser(static_unet):  # noqa: F811
    """The third pass runs by its recordings; the error names a layer."""
    x = torch.randn(2, 1, 16, 16)
    runs(static_unet, (1, 16, 16), {})
    assert any(isinstance(one, Recording) for one in recorded(static_unet))
    assert bool(static_unet(x, 500).sample.isfinite().all())
    weight = static_unet.down_blocks[0].resnets[0].norm1.weight
    before = weight[0].item()
    try:
        weight[0] = torch.nan
        with pytest.raises(StepquantError, match="NaN"), watched([static_unet]):
            static_unet(x, 500)
    finally:
        weight[0] = before
    x[1, 0, 3, 3] = torch.nan
    with pytest.raises(StepquantError, match="its input already contains NaN"), watched([static_unet]):
        static_unet(x, 500)


@torch.no_grad()
def test_watcher_of_one_layer():
    model = nn.Sequential(convolution(4, 4, 3, padding=1))
    prepare(model, "native")
    x = torch.randn(1, 4, 6, 6)
    x[0, 0, 0, 0] = torch.nan
    assert bool(model(x).isnan().any())
