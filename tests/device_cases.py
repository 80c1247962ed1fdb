"""Quantize on a (simulated) GPU: the whole model at once, or one block at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import stepquant as sq
from tests.simulated_device import GPU, simulated_gpu

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
    given = {} if recipe == "minmax" else {"hyperparameters": {"iterations": 1}}
    return sq.quantize(pipeline, "w4a8", recipe=recipe, calibration=CALIBRATION, device=device, **given)


def assert_close(result, expected, full):
    """Closer to each other than to full precision: another order of summation changes some codes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 1, 4, 4, generator=generator)
    with torch.no_grad():
        one, other, exact = (
            pipeline.unet.to("cpu")(x, torch.tensor(500)).sample for pipeline in (result, expected, full)
        )
    assert (one - other).norm() < 0.7 * (other - exact).norm()


@pytest.mark.parametrize("recipe", ["tdq"])
def test_a_pipeline_on_the_device(recipe, pipeline):
    expected = quantized(pipeline, recipe)
    with simulated_gpu():
        moved = copy.deepcopy(pipeline).to(GPU)
        result = quantized(moved, recipe)
        assert {str(tensor.device) for tensor in result.unet.parameters()} == {str(GPU)}
        assert not moved.unet._forward_pre_hooks and not moved.unet._forward_hooks
        with torch.no_grad():
            output = result.unet(torch.randn(1, 1, 4, 4).to(GPU), torch.tensor(500)).sample
        assert output.device == GPU
        assert_close(result, expected, pipeline)


@pytest.mark.parametrize("recipe", ["q-diffusion"])
def test_one_block_at_a_time(recipe, pipeline):
    expected = quantized(pipeline, recipe)
    on_cpu = copy.deepcopy(pipeline)
    with simulated_gpu() as memory:
        result = quantized(on_cpu, recipe, GPU)
        assert memory.peak > 0
        assert memory.used == 0, "everything is freed"
    assert_close(result, expected, pipeline)
    assert all(tensor.device.type == "cpu" for tensor in on_cpu.unet.parameters())
    assert not on_cpu.unet._forward_pre_hooks and not on_cpu.unet.conv_in._forward_pre_hooks
    result(batch_size=1, num_inference_steps=2, output_type="np")


def test_a_model_larger_than_the_device_memory():
    """Wide layers and small images, so that most of the memory is weights."""
    wide = unconditional(4, 32, 64)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in wide.unet.parameters())
    with simulated_gpu() as memory:
        quantized(wide, "minmax", GPU)
        assert memory.peak < 0.6 * weights


@pytest.mark.parametrize("recipe", ["quest", "tfmq"])
def test_recipes_that_train_the_whole_network_are_rejected_before_sampling(recipe, pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.unet, "forward", None)
    with simulated_gpu(), pytest.raises(sq.StepquantError, match=r"^finetuning trains the whole network at once"):
        sq.quantize(pipeline, "w4a8", recipe=recipe, calibration=CALIBRATION, device=GPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
@pytest.mark.parametrize("device", ["cuda", "no-such-device"])
def test_an_unavailable_device(device, pipeline):
    with pytest.raises(sq.StepquantError, match=f"device is '{device}', which is not available"):
        sq.quantize(pipeline, "w4a8", recipe="minmax", calibration=CALIBRATION, device=device)
