"""GPTQ of a block's weights: all inputs of a layer at once, or a wide layer in parts."""

from __future__ import annotations

import pytest
import torch

from stepquant.calibration.model import insert_fake_quantizers
from stepquant.calibration.samples import CalibrationSet
from stepquant.config import QuantSpec
from stepquant.core import gptq as core_gptq
from stepquant.distributed import Ranks
from stepquant.optimize.block import Block
from stepquant.optimize.gptq import gptq
from stepquant.optimize.replay import SampleValues
from tests.described import described

BLOCK, COUNT = "up_blocks.0.resnets.0", 64


@pytest.fixture(scope="module")
def seen(unconditional_pipeline):
    """Samples of noise, and the inputs and output of a block for them."""
    torch.manual_seed(0)
    unet = unconditional_pipeline.unet
    tensors = {"sample": torch.randn(COUNT, 1, 16, 16), "timestep": torch.arange(COUNT).float()}
    calls = []
    handle = unet.get_submodule(BLOCK).register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    with torch.no_grad():
        unet(**tensors)
    handle.remove()
    args, kwargs, output = calls[0]
    return (
        CalibrationSet.of(tensors, torch.zeros(COUNT, dtype=torch.long)),
        SampleValues.of((args, kwargs), COUNT),
        output,
    )


def errors(unet, seen):
    """Error of the block's output with weights of 3 bits, rounded to nearest and by GPTQ."""
    samples, inputs, expected = seen
    calibrated = insert_fake_quantizers(unet, described(unet), QuantSpec.parse("w3a16"))
    block = calibrated.model.get_submodule(BLOCK)

    def error() -> float:
        args, kwargs = inputs.at(slice(0, COUNT))
        with torch.no_grad():
            return float((block(*args, **kwargs) - expected).square().mean())

    before = error()
    layers = calibrated.layers_in(BLOCK)
    gptq(Block(BLOCK, unet, calibrated, inputs, inputs, samples, 16, Ranks()), layers)
    assert all(layer.weight_point.quantizer.fixed.shape == layer.inner.weight.shape for layer in layers.values())
    return before, error()


def test_a_wide_layer_in_parts_improves_nearly_as_much_as_the_whole(unconditional_pipeline, seen, monkeypatch):
    nearest, whole = errors(unconditional_pipeline.unet, seen)
    assert whole < 0.7 * nearest
    monkeypatch.setattr(core_gptq, "MOST_INPUTS", 9 * 8)  # convolutions of 16 to 32 channels, 3 x 3
    same, parts = errors(unconditional_pipeline.unet, seen)
    assert same == nearest and whole != parts < 0.85 * nearest
