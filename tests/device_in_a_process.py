"""Quantizing on another device: all of the model there, or one block at a time. The device is pretended."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import stepquant as sq
from tests.pretend import GPU, pretend_gpu

CALIBRATION = sq.Calibration(samples=4, steps=2)


def unconditional(sample_size, *channels):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=sample_size, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=channels,
        norm_num_groups=4, down_block_types=("AttnDownBlock2D",) * len(channels),
        up_block_types=("AttnUpBlock2D",) * len(channels), attention_head_dim=channels[0],
    )  # fmt: skip
    made = DDIMPipeline(unet.eval(), DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pipeline():
    return unconditional(4, 8)


def quantized(pipeline, recipe, device=None):
    learned = {} if recipe == "minmax" else {"iterations": 1}
    return sq.quantize(pipeline, "w4a8", recipe=recipe, calibration=CALIBRATION, device=device, **learned)


def assert_alike(found, expected, full):
    """Nearer to each other than to full precision: sums are taken in another order, and rounding multiplies that."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 1, 4, 4, generator=generator)
    with torch.no_grad():
        one, other, exact = (
            pipeline.unet.to("cpu")(x, torch.tensor(500)).sample for pipeline in (found, expected, full)
        )
    assert (one - other).norm() < 0.7 * (other - exact).norm()


@pytest.mark.parametrize("recipe", ["minmax", "tdq"])
def test_a_pipeline_that_is_there(recipe, pipeline):
    expected = quantized(pipeline, recipe)
    with pretend_gpu():
        there = copy.deepcopy(pipeline).to(GPU)
        result = quantized(there, recipe)
        assert {str(tensor.device) for tensor in result.unet.parameters()} == {str(GPU)}
        assert not there.unet._forward_pre_hooks and not there.unet._forward_hooks
        with torch.no_grad():
            drawn = result.unet(torch.randn(1, 1, 4, 4).to(GPU), torch.tensor(500)).sample
        assert drawn.device == GPU
        assert_alike(result, expected, pipeline)


@pytest.mark.parametrize("recipe", ["minmax", "q-diffusion"])
def test_one_block_at_a_time(recipe, pipeline):
    expected = quantized(pipeline, recipe)
    here = copy.deepcopy(pipeline)
    with pretend_gpu() as memory:
        result = quantized(here, recipe, GPU)
        assert memory.peak > 0
        assert memory.used == 0, "nothing stays"
    assert_alike(result, expected, pipeline)
    assert all(tensor.device.type == "cpu" for tensor in here.unet.parameters())
    assert not here.unet._forward_pre_hooks and not here.unet.conv_in._forward_pre_hooks
    result(batch_size=1, num_inference_steps=2, output_type="np")


def test_a_model_need_not_fit():
    """Of wide layers and small images, so that weights are most of what has to."""
    wide = unconditional(4, 32, 64)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in wide.unet.parameters())
    with pretend_gpu() as memory:
        quantized(wide, "minmax", GPU)
        assert memory.peak < 0.6 * weights


@pytest.mark.parametrize("recipe", ["quest", "tfmq"])
def test_what_needs_the_whole_network_is_refused_before_anything_is_drawn(recipe, pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.unet, "forward", None)
    with pretend_gpu(), pytest.raises(sq.StepquantError, match=f"^{recipe} learns through the whole network at once"):
        sq.quantize(pipeline, "w4a8", recipe=recipe, calibration=CALIBRATION, device=GPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "no-such-thing"])
def test_a_device_that_is_not_here(device, pipeline):
    with pytest.raises(sq.StepquantError, match=f"device is '{device}', which cannot be used here"):
        sq.quantize(pipeline, "w4a8", recipe="minmax", calibration=CALIBRATION, device=device)
