"""A corrected sampler adds less noise, so that with quantization noise the variance is that of full precision."""

import copy
import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, EulerDiscreteScheduler

import stepquant
from stepquant.layers.clock import StepClock
from stepquant.layers.correction import Correction, OutputCorrection
from stepquant.pipelines.corrected_scheduler import with_less_noise

VARIANCE = 0.25


def correction(variance=VARIANCE):
    part = OutputCorrection(2, StepClock())
    part.fill(Correction(torch.tensor([0.0, 999.0]), torch.ones(2), torch.full((2,), variance)))
    return part


def next_sample(scheduler, noise_in_prediction, **arguments):
    """Many samples of one step from the same sample: float [n]."""
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(0)
    prediction = 0.5 + noise_in_prediction**0.5 * torch.randn(1, 200_000, generator=generator)
    sample = torch.full((1, 200_000), 0.2)
    return scheduler.step(prediction, scheduler.timesteps[3], sample, generator=generator, **arguments).prev_sample[0]


@pytest.mark.parametrize(
    "scheduler, arguments",
    [
        (DDPMScheduler(clip_sample=False), {}),
        (DDPMScheduler(clip_sample=False, variance_type="fixed_large"), {}),
        (DDIMScheduler(clip_sample=False), {"eta": 1.0}),
        (DDIMScheduler(clip_sample=False), {"eta": 0.6}),
    ],
)
def test_the_variance_of_a_step_equals_that_of_full_precision(scheduler, arguments):
    exact = next_sample(copy.deepcopy(scheduler), 0.0, **arguments)
    uncorrected = next_sample(copy.deepcopy(scheduler), VARIANCE, **arguments)
    corrected = next_sample(with_less_noise(scheduler, correction()), VARIANCE, **arguments)
    assert uncorrected.var() > 1.03 * exact.var()
    torch.testing.assert_close(corrected.var(), exact.var(), rtol=0.01, atol=0)
    torch.testing.assert_close(corrected.mean(), exact.mean(), rtol=0.05, atol=0)


def test_noise_never_becomes_negative():
    scheduler = with_less_noise(DDIMScheduler(clip_sample=False), correction(variance=1e6))
    assert float(next_sample(scheduler, 0.0, eta=1.0).var()) == pytest.approx(0, abs=1e-9)


def test_samplers_without_noise_are_unchanged():
    euler = EulerDiscreteScheduler()
    assert with_less_noise(euler, correction()) is euler
    velocity = DDPMScheduler(prediction_type="v_prediction")
    assert with_less_noise(velocity, correction()) is velocity
    ddim = DDIMScheduler(clip_sample=False)
    assert torch.equal(next_sample(with_less_noise(ddim, correction()), 0.1), next_sample(ddim, 0.1))


def test_a_saved_pipeline_names_the_original_sampler(unconditional_pipeline, tmp_path):
    pipeline = DDPMPipeline(unconditional_pipeline.unet, DDPMScheduler())
    original = pipeline.scheduler
    calibration = stepquant.Calibration(samples=4, steps=2)
    quantized = stepquant.quantize(pipeline, "w4a8", recipe="minmax", calibration=calibration, correction=True)
    assert pipeline.scheduler is original and type(original) is DDPMScheduler
    assert hasattr(quantized.scheduler, "correction")
    quantized.save_pretrained(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    loaded = stepquant.load(tmp_path / "out")
    assert isinstance(loaded.scheduler, DDPMScheduler) and hasattr(loaded.scheduler, "correction")
    images = [
        pipe(num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
        for pipe in (quantized, loaded)
    ]
    assert (images[0] == images[1]).all()
