"""Several denoisers of one pipeline are quantized, saved and loaded, each calibrated on the calls that it gets."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import nn

import stepquant
from stepquant.errors import StepquantError
from stepquant.layers.quantized import quantized_modules
from stepquant.models.denoisers import quantized_denoisers
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.pipelines.share import own_steps
from stepquant.saving import provenance_of
from stepquant.targets import parse_specs

SMALL = stepquant.Calibration(samples=8, steps=5)


class TwoExperts(DDIMPipeline):
    """The first expert denoises above timestep 500, the second below, as in Wan 2.2."""

    def __init__(self, unet, unet_2, scheduler):
        DiffusionPipeline.__init__(self)
        self.register_modules(unet=unet, unet_2=unet_2, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=50, output_type="np"):
        size = self.unet.config.sample_size
        image = torch.stack([torch.randn(1, size, size, generator=one) for one in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for time in self.scheduler.timesteps:
            unet = self.unet if time >= 500 else self.unet_2
            image = self.scheduler.step(unet(image, time).sample, time, image).prev_sample
        return ImagePipelineOutput(images=image.permute(0, 2, 3, 1).numpy())


@pytest.fixture(scope="module")
def experts(unconditional_pipeline):
    second = copy.deepcopy(unconditional_pipeline.unet)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(0.9)
    return TwoExperts(unconditional_pipeline.unet, second, unconditional_pipeline.scheduler)


def images(pipeline):
    return generate(pipeline, make_request(pipeline, 5), range(2), 0)


@pytest.fixture(scope="module")
def quantized(experts):
    return stepquant.quantize(
        experts, {"unet": "w8a8", "unet_2": "w4a8"}, recipe="tdq", hyperparameters={"iterations": 1}, calibration=SMALL
    )


def test_each_expert_has_its_own_steps(experts, quantized):
    request = make_request(experts, 5)
    assert [own_steps(experts, name, request) for name in ("unet", "unet_2")] == [2, 3]
    for name, bits in (("unet", "w8a8"), ("unet_2", "w4a8")):
        denoiser = getattr(quantized, name)
        assert provenance_of(denoiser)["spec"]["bits"] == bits
        weights = {module.format.weight.bits for module in quantized_modules(denoiser).values()}
        assert weights == {int(bits[1]), 8}, "first and last layer keep 8"
    assert not quantized_denoisers(experts)
    error = (images(quantized) - images(experts)).abs().mean()
    assert 0 < error < 0.3


def test_one_spec_is_for_all(experts):
    assert parse_specs(experts, "w8a8") == dict.fromkeys(["unet", "unet_2"], stepquant.QuantSpec.parse("w8a8"))
    both = stepquant.quantize(experts, "w8a8", recipe="minmax", calibration=SMALL)
    assert list(quantized_denoisers(both)) == ["unet", "unet_2"]
    one = stepquant.quantize(experts, {"unet_2": "w8a8"}, recipe="minmax", calibration=SMALL)
    assert list(quantized_denoisers(one)) == ["unet_2"] and one.unet is experts.unet


def test_save_and_load(quantized, tmp_path):
    quantized.save_pretrained(tmp_path / "model")
    with pytest.raises(StepquantError, match="pipeline_class=TwoExperts"):
        stepquant.load(tmp_path / "model")
    loaded = stepquant.load(tmp_path / "model", pipeline_class=TwoExperts)
    assert type(loaded) is TwoExperts
    assert torch.equal(images(loaded), images(quantized))
    assert torch.equal(images(TwoExperts.from_pretrained(tmp_path / "model")), images(quantized))
    assert "The unet and the unet_2 of" in (tmp_path / "model" / "README.md").read_text()


def test_the_ranking_is_of_one(experts):
    with pytest.raises(StepquantError, match="unet and unet_2; expected one denoiser"):
        stepquant.sensitivity(experts, "w4a8")
    ranking = stepquant.sensitivity(experts, {"unet_2": "w4a8"}, calibration={"samples": 4, "steps": 5})
    assert ranking.steps[0][1] <= 3, "of three steps"


def test_a_controlnet_is_quantized_with_its_denoiser(text_pipeline, tmp_path):
    controlnet = diffusers.ControlNetModel.from_unet(text_pipeline.unet, conditioning_embedding_out_channels=(8, 8))
    for parameter in controlnet.controlnet_down_blocks.parameters():
        nn.init.normal_(parameter)
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        **text_pipeline.components, controlnet=controlnet.eval(), requires_safety_checker=False
    )
    assert list(parse_specs(pipeline, "w8a8")) == ["unet"], "a ControlNet is quantized only if it is named"
    arguments = {"inputs": {"image": torch.rand(1, 3, 16, 16)}, "prompts": ["a", "b"]}
    quantized = stepquant.quantize(
        pipeline, {"unet": "w8a8", "controlnet": "w8a8"}, recipe="minmax", calibration=SMALL, **arguments
    )
    assert set(quantized_denoisers(quantized)) == {"unet", "controlnet"}
    request = make_request(pipeline, 2, **arguments)
    produced, expected = (generate(one, request, range(2), 0) for one in (quantized, pipeline))
    assert 0 < (produced - expected).abs().mean() < 0.2
    quantized.save_pretrained(tmp_path / "model")
    assert torch.equal(generate(stepquant.load(tmp_path / "model"), request, range(2), 0), produced)


def test_what_is_not_a_denoiser_is_refused(text_pipeline):
    with pytest.raises(StepquantError, match="spec names 'transformer_2', which is not a denoiser of StableDiffusion"):
        stepquant.quantize(text_pipeline, {"transformer_2": "w4a8"})
    with pytest.raises(StepquantError, match="has no model 'unet' beside its denoiser"):
        stepquant.quantize(text_pipeline, {"unet": "w4a8"}, also={"unet": "w8a16"})
