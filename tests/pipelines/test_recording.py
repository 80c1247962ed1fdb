"""Recorded calls repeat what the pipeline's own calls of a module compute, whatever the structure of arguments."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMPipeline
from torch import nn

from stepquant.errors import StepquantError
from stepquant.pipelines.doubling import doubled_call
from stepquant.pipelines.recording import on_call, record_calls
from stepquant.pipelines.request import make_request


class Listed(nn.Module):
    """A denoiser that takes a list of samples, calls its timestep `t`, and has further arguments."""

    def __init__(self, unet):
        super().__init__()
        self.inner, self.config, self.dtype = unet, unet.config, unet.dtype

    def forward(self, x, t, sizes=None, **options):
        scale = options["attention_kwargs"]["scale"]
        return [self.inner(one[None] * scale, t).sample[0] for one in x], sizes


class ListedPipeline(DDIMPipeline):
    """Gives every sample its own tensor and size, and changes its samples in place."""

    def __init__(self, unet, scheduler):
        super().__init__(unet.inner, scheduler)
        self.unet = unet

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=50, output_type="np"):
        size = self.unet.config.sample_size
        image = torch.stack([torch.randn(1, size, size, generator=one) for one in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for time in self.scheduler.timesteps:
            sizes = [[(1, size, size)]] * batch_size
            noise, _ = self.unet(list(image), time, sizes, attention_kwargs={"scale": 2.0, "mask": None})
            image.copy_(self.scheduler.step(torch.stack(noise), time, image).prev_sample)
        raise AssertionError("generation was not ended")


def test_calls_repeat_what_the_pipeline_computes(text_pipeline):
    request = make_request(text_pipeline, 5, prompts=["a", "bb"])
    calls = record_calls(text_pipeline, "unet", request, [0, 1, 1], 0, steps=2)
    assert [call.step for call in calls] == [0, 1]
    for call in calls:
        assert call.arguments["sample"].shape[0] == 6, "guidance doubles the batch"
        with torch.no_grad():
            again = text_pipeline.unet(**call.arguments)
        assert torch.equal(again[0], call.output[0])
    latents = calls[0].arguments["sample"]
    assert torch.equal(latents[1], latents[2]), "image 1 twice"
    assert not torch.equal(latents[0], latents[1])


def test_every_call_of_a_step_is_recorded(text_pipeline):
    calls: list[str] = []

    class Twice(DDIMPipeline):
        @torch.no_grad()
        def __call__(self, batch_size=1, generator=None, num_inference_steps=50, output_type="np"):
            self.scheduler.set_timesteps(num_inference_steps)
            for time in self.scheduler.timesteps:
                for condition in (0.0, 1.0):
                    self.unet(torch.zeros(1, 4, 8, 8), time, torch.full((1, 3, 16), condition))
                    calls.append("unet")
            raise AssertionError("generation was not ended")

    pipeline = Twice(text_pipeline.unet, text_pipeline.scheduler)
    recorded = record_calls(pipeline, "unet", make_request(pipeline, 4), [0], 0, steps=2)
    assert [call.step for call in recorded] == [0, 0, 1, 1] and len(calls) == 4
    assert [float(call.arguments["encoder_hidden_states"].mean()) for call in recorded] == [0, 1, 0, 1]


def test_lists_and_values_that_are_not_tensors(unconditional_pipeline):
    pipeline = ListedPipeline(Listed(unconditional_pipeline.unet), unconditional_pipeline.scheduler)
    (call,) = record_calls(pipeline, "unet", make_request(pipeline, 4), range(3), 7)
    assert set(call.arguments) == {"x", "t", "sizes", "attention_kwargs"}
    assert call.arguments["sizes"] == [[(1, 16, 16)]] * 3
    assert call.arguments["attention_kwargs"] == {"scale": 2.0, "mask": None}
    start = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(7))
    assert torch.equal(call.arguments["x"][0], start), "a copy: the pipeline changes its samples in place"
    with torch.no_grad():
        again, _ = pipeline.unet(**call.arguments)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, call.output[0], strict=True))
    assert not pipeline.unet._forward_hooks and not pipeline.unet._forward_pre_hooks


def test_a_component_that_is_not_called(unconditional_pipeline):
    pipeline = copy.copy(unconditional_pipeline)
    pipeline.controlnet = nn.Identity()
    with pytest.raises(StepquantError, match="DDIMPipeline does not call its controlnet"):
        record_calls(pipeline, "controlnet", make_request(pipeline, 2), [0], 0)


class Taking(nn.Module):
    """Takes what it adds out of a list, as a UNet does with the residuals of a T2I-Adapter."""

    def forward(self, sample, timestep, residuals):
        return sample + residuals.pop(0) + residuals.pop(0)


def test_arguments_are_recorded_as_they_were_before_the_call():
    module, residuals, seen = Taking(), [torch.ones(2, 3), torch.zeros(2, 3)], []
    remove = on_call(module, lambda arguments, output: seen.append((arguments, output)))
    module(torch.zeros(2, 3), 1.0, residuals)
    remove()
    assert residuals == [] and not module._forward_hooks and not module._forward_pre_hooks
    ((arguments, output),) = seen
    assert torch.equal(arguments["residuals"][0], torch.ones(2, 3)) and torch.equal(output, torch.ones(2, 3))
    doubled, _, twice = doubled_call(module, arguments)
    assert [part.shape for part in (twice, *doubled["residuals"])] == [(4, 3)] * 3, "no list of samples"
