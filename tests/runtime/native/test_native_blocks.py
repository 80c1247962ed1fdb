"""Whole denoisers with fused blocks against the reference runtime."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import pytest
import torch

import stepquant as sq
from stepquant.calibration.model import insert_fake_quantizers
from stepquant.config import QuantSpec
from stepquant.layers.install import install
from stepquant.layers.quantized import replace_module
from stepquant.runtime import prepare
from stepquant.runtime.native.kernel import NativeKernel
from tests.described import described

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(scope="module")
def unet(unconditional_pipeline):
    """Quantized with a table row for each of three steps."""
    torch.manual_seed(0)
    full = unconditional_pipeline.unet
    timesteps = torch.tensor([100.0, 500.0, 900.0])
    spec = QuantSpec.parse("w8a8")
    calibrated = insert_fake_quantizers(full, described(full), spec, timesteps=timesteps, weight_range="minmax")
    for quantizer in calibrated.activation_points():
        quantizer.observe()
    with torch.no_grad():
        for timestep in timesteps:
            calibrated.model(torch.randn(4, 1, 16, 16), timestep)
    for quantizer in calibrated.activation_points():
        quantizer.calibrate("minmax", per_row=True)
    result = copy.deepcopy(full)
    install(result, calibrated.to_quantized())
    return result


class Twice(torch.nn.Module):
    """Wraps a layer, as an adapter does."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) * 2


def signal_to_noise(found, expected) -> float:
    return float(10 * torch.log10(expected.square().mean() / (found - expected).square().mean()))


@torch.no_grad()
@pytest.mark.parametrize("timestep", [500, torch.tensor([900, 500, 100])], ids=["one step", "mixed steps"])
def test_unet(unet, timestep):
    """Most samples agree to float rounding; a code at a tie changes a few later ones."""
    models = {name: copy.deepcopy(unet) for name in ("reference", "native")}
    for name, model in models.items():
        prepare(model, name)
    decibels = []
    for seed in range(4):
        x = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
        expected, found = (model(x, timestep).sample for model in models.values())
        assert found.dtype == torch.float32
        decibels += [signal_to_noise(*pair) for pair in zip(found, expected, strict=True)]
    assert median(decibels) > 80
    assert min(decibels) > 20


@torch.no_grad()
def test_blocks_are_fused(unet):
    """Only the normalization before the last layer runs unfused, until another runtime is installed."""
    model = copy.deepcopy(unet)
    seen = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_hook(lambda _module, _args, _output, name=name: seen.append(name))
    prepare(model, "native")
    model(torch.randn(1, 1, 16, 16), 500)
    assert seen == ["conv_norm_out"]
    prepare(model, "reference")
    model(torch.randn(1, 1, 16, 16), 500)
    assert len(seen) > 10


@torch.no_grad()
@pytest.mark.parametrize("place", ["resnets.0.conv1", "attentions.0.to_q", "upsamplers.0.conv"])
def test_layer_wrapped_later_is_called(unet, place):
    """As by an adapter: the wrapper is not bypassed."""
    models = {}
    for backend in ("reference", "native"):
        model = models[backend] = copy.deepcopy(unet)
        prepare(model, backend)
        replace_module(model, f"up_blocks.0.{place}", Twice(model.get_submodule(f"up_blocks.0.{place}")))
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    expected, found = (model(x, 500).sample for model in models.values())
    assert median(signal_to_noise(*pair) for pair in zip(found, expected, strict=True)) > 60


@torch.no_grad()
def test_copies_have_separate_clocks(unet):
    models = [copy.deepcopy(unet)]
    prepare(models[0], "native")
    models.append(copy.deepcopy(models[0]))
    x = torch.randn(2, 1, 16, 16)
    alone = [model(x, timestep).sample for model, timestep in zip(models, (900, 100), strict=True)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            both = pool.map(lambda pair: pair[0](x, pair[1]).sample, zip(models, (900, 100), strict=True))
            for found, expected in zip(both, alone, strict=True):
                assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["text_pipeline", "class_pipeline"])
def test_other_families(name, request):
    pipeline = request.getfixturevalue(name)
    quantized = sq.quantize(pipeline, "w8a8", recipe="minmax", calibration=sq.Calibration(samples=2, steps=2))
    component = "unet" if hasattr(quantized, "unet") else "transformer"
    denoiser = getattr(quantized, component)
    found = {}
    for backend in ("reference", "native"):
        model = copy.deepcopy(denoiser)
        assert prepare(model, backend) == backend
        torch.manual_seed(0)
        if component == "unet":
            arguments = dict(timestep=10, encoder_hidden_states=torch.randn(2, 7, 16))
        else:
            arguments = dict(timestep=torch.tensor([10, 10]), class_labels=torch.tensor([1, 2]))
        found[backend] = model(torch.randn(2, 4, 8, 8), **arguments).sample
    assert any(isinstance(getattr(module, "kernel", None), NativeKernel) for module in model.modules())
    assert signal_to_noise(found["native"], found["reference"]) > 20


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnets.0", "attentions.0"])
def test_images_of_any_layout(unet, name):
    """A block reads its input twice: for its first layer, and as the residual."""
    model = copy.deepcopy(unet)
    prepare(model, "native")
    block = model.mid_block.get_submodule(name)
    whole = torch.randn(4, 16, 8, 8).to(memory_format=torch.channels_last)
    more = {"temb": torch.randn(2, 32)} if name == "resnets.0" else {}
    for x in (whole[::2], whole[:1].expand(2, -1, -1, -1), whole[:2, :, ::2], whole[:2, ..., 2:6]):
        assert torch.equal(block(x, **more), block(x.contiguous(memory_format=torch.channels_last), **more))
