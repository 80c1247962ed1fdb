"""Generating does not change the pipeline, and counts steps independently of how it uses its scheduler."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from diffusers import DDIMPipeline, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from stepquant.errors import StepquantError
from stepquant.pipelines.generate import generate
from stepquant.pipelines.recording import on_call
from stepquant.pipelines.request import make_request

STEPS = 4


class TwoSchedulers(DDIMPipeline):
    """Also steps a copy of its scheduler, as LTX-2 does for sound."""

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=50, output_type="np"):
        size = self.unet.config.sample_size
        image = torch.stack([torch.randn(1, size, size, generator=one) for one in generator])
        sound = image.flip(0)
        self.scheduler.set_timesteps(num_inference_steps)
        copied = copy.deepcopy(self.scheduler)
        for time in self.progress_bar(self.scheduler.timesteps):
            sound = copied.step(self.unet(sound, time).sample, time, sound).prev_sample
            image = self.scheduler.step(self.unet(image, time).sample, time, image).prev_sample
        return ImagePipelineOutput(images=(image + sound).permute(0, 2, 3, 1).numpy())


@pytest.fixture
def pipeline(unconditional_pipeline):
    pipeline = copy.copy(unconditional_pipeline)
    pipeline.scheduler = copy.deepcopy(unconditional_pipeline.scheduler)
    return pipeline


def test_a_pipeline_may_copy_its_scheduler(pipeline):
    scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    copying = TwoSchedulers(pipeline.unet, pipeline.scheduler)
    copying.scheduler = scheduler  # its constructor would replace it by DDIM
    copying.set_progress_bar_config(disable=True)
    expected = copying(2, [torch.Generator().manual_seed(i) for i in range(2)], STEPS).images
    steps = []
    images = generate(copying, make_request(copying, STEPS), range(2), 0, on_step=lambda: steps.append(1))
    assert torch.equal(images, torch.from_numpy(expected).permute(0, 3, 1, 2) * 2 - 1)
    assert len(steps) == STEPS


@pytest.mark.parametrize("failing", [False, True])
def test_the_pipeline_is_unchanged(pipeline, failing):
    """So is its scheduler while it runs, where a user's callback may read it."""
    pipeline.scheduler.set_timesteps(STEPS)
    before = [set(vars(part)) for part in (pipeline, pipeline.scheduler)]
    during = []

    def look(*_args) -> None:
        during.append(set(vars(pipeline.scheduler)))
        if failing:
            raise KeyError("of the model")

    handle = pipeline.unet.register_forward_pre_hook(look)
    with pytest.raises(KeyError) if failing else nullcontext():
        generate(pipeline, make_request(pipeline, STEPS), range(1), 0)
    handle.remove()
    assert [set(vars(part)) for part in (pipeline, pipeline.scheduler)] == before
    assert during[0] == before[1]
    assert not pipeline.unet._forward_hooks


def test_a_step_of_a_second_order_sampler_counts_once(pipeline):
    """Heun's sampler evaluates the denoiser twice per step, the second time at the next timestep."""
    scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline = TwoSchedulers(pipeline.unet, pipeline.scheduler)
    pipeline.scheduler = scheduler
    steps = []
    generate(pipeline, make_request(pipeline, STEPS), range(1), 0, on_step=lambda: steps.append(1))
    assert len(steps) == STEPS and len(scheduler.timesteps) == 2 * STEPS - 1


class Guided(DDIMPipeline):
    """Takes a strength, and at most one sample with it; counts its calls."""

    calls = 0

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=50, output_type="np", strength=1.0):
        type(self).calls += 1
        if batch_size > 1 and strength < 1:
            raise ValueError("a strength needs a single sample")
        return super().__call__(batch_size, generator, num_inference_steps=num_inference_steps, output_type=output_type)


@pytest.mark.parametrize("split", [True, False])
def test_a_rejected_batch_is_generated_one_by_one_unless_it_is_recorded(pipeline, split):
    guided = Guided(pipeline.unet, pipeline.scheduler)
    guided.set_progress_bar_config(disable=True)
    request = make_request(guided, 2, inputs={"strength": 0.5})
    if split:
        whole = generate(guided, make_request(guided, 2, inputs={"strength": 1.0}), range(2), 0)
        torch.testing.assert_close(generate(guided, request, range(2), 0), whole)
    else:
        with pytest.raises(StepquantError, match="Guided rejects its arguments: a strength needs a single sample"):
            generate(guided, request, range(2), 0, split=False)


def test_an_error_of_a_recording_hook_is_not_taken_for_rejected_arguments(pipeline):
    guided = Guided(pipeline.unet, pipeline.scheduler)
    guided.set_progress_bar_config(disable=True)

    def receive(arguments, output):
        raise RuntimeError("of the recorder")

    Guided.calls, remove = 0, on_call(guided.unet, receive)
    with pytest.raises(RuntimeError, match="of the recorder"):
        generate(guided, make_request(guided, 2, inputs={"strength": 1.0}), range(2), 0)
    remove()
    assert Guided.calls == 1
