"""Requests fit any pipeline's call, and what does not fit is one sentence."""

from __future__ import annotations

import copy
import re

import diffusers
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from stepquant.errors import StepquantError
from stepquant.models.denoisers import denoiser_name, denoisers, primary_denoisers
from stepquant.pipelines.call import gives_latents, kind_of, missing_parameters, step_parameters, takes_batches
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request


def unet(**config):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4, **config,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def consistency() -> ConsistencyModelPipeline:
    """A consistency model of seven classes, which was trained at 40 timesteps."""
    return ConsistencyModelPipeline(unet(num_class_embeds=7), CMStochasticIterativeScheduler())


def instance(name):
    """A pipeline of a class, without components: what its call takes is read from the class."""
    cls = getattr(diffusers, name)
    return cls.__new__(cls)


def test_a_consistency_model_generates_what_its_own_call_does(consistency):
    request = make_request(consistency, 2, labels=[3, 5])
    samples = generate(consistency, request, range(3), 7)
    for index, label in enumerate([3, 5, 3]):
        generator = torch.Generator().manual_seed(7 + index)
        with torch.no_grad():
            expected = consistency(1, label, num_inference_steps=2, generator=generator, output_type="np").images
        assert torch.allclose(samples[index], torch.from_numpy(expected[0]).permute(2, 0, 1) * 2 - 1, atol=1e-6)


def test_classes_that_exist_are_the_default(consistency):
    assert kind_of(consistency) == "class"
    assert make_request(consistency, 2).conditions == tuple(range(7))
    assert kind_of(ConsistencyModelPipeline(unet(), CMStochasticIterativeScheduler())) == "unconditional"


def test_the_steps_of_a_schedule_replace_the_number_of_steps(consistency):
    assert make_request(consistency, 1, inputs={"timesteps": [22, 0]}).steps == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"steps": 50},
            "steps is 50; expected at most the 40 timesteps that the model has. Set `steps` to 40 or fewer",
        ),
        ({"steps": 0}, "expected at least 1"),
        ({"guidance": 4.0}, "ConsistencyModelPipeline has no guidance. Leave out `guidance`"),
        ({"labels": [7]}, "label 7 does not exist; expected 0 to 6"),
        ({"prompts": ["a"]}, "conditioned on class labels. Leave out `prompts`"),
        ({"size": 16}, "generates images of one size"),
        ({"inputs": {"image": 1}}, "'image', which is not an argument of ConsistencyModelPipeline"),
        ({"inputs": {"generator": 1}}, "'generator', which is not an input. Give `seed` instead"),
        ({"inputs": {"batch_size": 2}}, "'batch_size', which is not an input. Leave it out"),
        ({"inputs": [{"timesteps": [2]}, {}]}, "expected the same ones for every sample"),
        ({"inputs": [1]}, "expected one dictionary of arguments per sample"),
    ],
)
def test_what_does_not_fit_is_refused(consistency, arguments, message):
    with pytest.raises(StepquantError, match=re.escape(message)):
        make_request(consistency, **{"steps": 2} | arguments)


def test_steps_are_limited_by_the_scheduler(unconditional_pipeline):
    with pytest.raises(StepquantError, match="at most the 1000"):
        make_request(unconditional_pipeline, 1001)
    flow = copy.copy(unconditional_pipeline)
    flow.scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, use_dynamic_shifting=True)
    assert make_request(flow, 50).steps == 50, "its time is continuous, as in OmniGen"


def test_inputs_may_differ_between_samples(text_pipeline):
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**text_pipeline.components, requires_safety_checker=False)
    images = torch.rand(2, 3, 16, 16)
    both = make_request(pipeline, 4, prompts=["a", "b"], inputs={"image": images, "strength": 0.5})
    rows = [{"image": image[None], "strength": 0.5} for image in images]
    listed = make_request(pipeline, 4, prompts=["a", "b"], inputs=rows)
    shared = [make_request(pipeline, 4, prompts=["a", "b"], inputs=row) for row in rows]
    samples = generate(pipeline, both, range(2), 0)
    assert torch.equal(samples, generate(pipeline, listed, range(2), 0))
    for index, request in enumerate(shared):
        assert torch.allclose(samples[index : index + 1], generate(pipeline, request, [index], 0), atol=1e-5)
    assert not torch.allclose(samples[1:], generate(pipeline, shared[0], [1], 0), atol=1e-2)


def test_an_image_that_is_needed_but_optional(text_pipeline):
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**text_pipeline.components, requires_safety_checker=False)
    request = make_request(pipeline, 2, prompts=["a"])
    with pytest.raises(StepquantError, match="Pass what its call needs as `inputs`; it also takes image"):
        generate(pipeline, request, [0], 0)
    wrong = make_request(pipeline, 2, prompts=["a"], inputs={"image": torch.rand(1, 5, 16, 16)})
    with pytest.raises(StepquantError, match="StableDiffusionImg2ImgPipeline rejects its arguments"):
        generate(pipeline, wrong, [0], 0)


def test_what_calls_take():
    assert missing_parameters(instance("StableVideoDiffusionPipeline"), {}) == ["image"]
    assert missing_parameters(instance("Flux2Pipeline"), {}) == []
    assert missing_parameters(instance("KandinskyV22Pipeline"), {"image_embeds": 1}) == ["negative_image_embeds"]
    assert step_parameters(instance("StableCascadeCombinedPipeline")) == [
        "prior_num_inference_steps", "num_inference_steps",
    ]  # fmt: skip
    batches = ["DDIMPipeline", "DiTPipeline", "WanPipeline", "AudioLDM2Pipeline", "Flux2Pipeline"]
    assert all(takes_batches(instance(name)) for name in batches)
    assert not any(takes_batches(instance(name)) for name in ["StableVideoDiffusionPipeline", "ShapEPipeline"])
    assert gives_latents(instance("WanPipeline")) and not gives_latents(instance("DiTPipeline"))


def test_denoisers_have_a_timestep(text_pipeline, unconditional_pipeline):
    assert list(denoisers(text_pipeline)) == ["unet"]
    controlnet = diffusers.ControlNetModel.from_unet(text_pipeline.unet, conditioning_embedding_out_channels=(8, 8))
    guided = diffusers.StableDiffusionControlNetPipeline(
        **text_pipeline.components, controlnet=controlnet, requires_safety_checker=False
    )
    assert set(denoisers(guided)) == {"unet", "controlnet"} and list(primary_denoisers(guided)) == ["unet"]
    assert denoiser_name(unconditional_pipeline) == "unet"


def test_a_pipeline_without_a_denoiser(text_pipeline):
    class Encoder(DDIMPipeline):
        def __init__(self, vae, scheduler):
            diffusers.DiffusionPipeline.__init__(self)
            self.register_modules(vae=vae, scheduler=scheduler)

    pipeline = Encoder(text_pipeline.vae, text_pipeline.scheduler)
    with pytest.raises(StepquantError, match="Encoder has no denoiser; expected a component whose forward takes"):
        generate(pipeline, make_request(pipeline, 2), [0], 0)
