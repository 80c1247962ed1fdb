"""Common uses of Stable Diffusion work unchanged on a quantized pipeline."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler, UniPCMultistepScheduler

import stepquant


@pytest.fixture(scope="module")
def quantized(text_pipeline, tmp_path_factory):
    """A quantized folder, as diffusers loads it."""
    calibration = stepquant.Calibration(samples=8, steps=2)
    folder = tmp_path_factory.mktemp("quantized") / "model"
    stepquant.quantize(text_pipeline, "w8a8", recipe="minmax", calibration=calibration).save_pretrained(folder)
    return DiffusionPipeline.from_pretrained(folder)


def call(pipeline, **arguments):
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(
        pipeline("a", num_inference_steps=2, generator=generator, output_type="np", **arguments).images
    )


@pytest.mark.parametrize(
    "arguments",
    [{"negative_prompt": "b"}, {"num_images_per_prompt": 3}, {"guidance_scale": 1.0}, {"eta": 0.5}, {"height": 32}],
)
def test_arguments_of_the_call_work_as_in_full_precision(arguments, quantized, text_pipeline):
    produced, expected = call(quantized, **arguments), call(text_pipeline, **arguments)
    assert produced.shape == expected.shape and torch.isfinite(produced).all()
    assert 0 < (produced - expected).abs().mean() < 0.1


def test_a_callback_sees_and_changes_every_step(quantized):
    seen = []

    def at_the_end_of_a_step(pipeline, step, timestep, values):
        seen.append((step, int(timestep)))
        return {"latents": torch.zeros_like(values["latents"])}

    changed = call(quantized, callback_on_step_end=at_the_end_of_a_step)
    assert [step for step, _ in seen] == [0, 1]
    blank = quantized.vae.decode(torch.zeros(1, 4, 8, 8)).sample.permute(0, 2, 3, 1) / 2 + 0.5
    assert torch.allclose(changed, blank.clamp(0, 1), atol=1e-4)


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, UniPCMultistepScheduler])
def test_schedulers_are_swapped(scheduler, quantized, text_pipeline):
    """All others are in ``layers/test_schedulers.py``, with per-step scales."""
    results = []
    for source in (text_pipeline, quantized):
        pipeline = copy.copy(source)
        pipeline.scheduler = scheduler.from_config(source.scheduler.config)
        results.append(call(pipeline))
    assert 0 < (results[1] - results[0]).abs().mean() < 0.1


def test_a_compiled_denoiser(quantized):
    """Traced but not compiled; see also ``runtime/test_compile.py``."""
    compiled = copy.copy(quantized)
    compiled.unet = torch.compile(quantized.unet, backend="eager")
    assert torch.allclose(call(compiled), call(quantized), atol=1e-5)
