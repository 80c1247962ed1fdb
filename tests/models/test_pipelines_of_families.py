"""Describe, quantize, save, load and sample a small model of each family, and pipelines that share a denoiser."""

from __future__ import annotations

import copy
import inspect

import diffusers
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from torch import nn

import stepquant
from stepquant.errors import StepquantError
from stepquant.layers.attention import QuantizedAttentionProcessor
from stepquant.layers.quantized import quantized_modules
from stepquant.models import denoiser_name
from stepquant.pipelines.description import describe_component
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.quality.fidelity import Shadow

PROMPTS = ["a red bicycle", "a"]
SMALL = stepquant.Calibration(samples=12, steps=2, size=16)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def pipeline(request, tmp_path_factory):
    return tiny.FAMILIES[request.param](tmp_path_factory.mktemp("family"))


def inputs_of(pipeline) -> dict:
    """A short text length instead of the default of hundreds of tokens."""
    takes = "max_sequence_length" in inspect.signature(type(pipeline).__call__).parameters
    return {"max_sequence_length": 8} if takes else {}


def images(pipeline, steps: int = 2):
    request = make_request(pipeline, steps, prompts=PROMPTS, size=16, inputs=inputs_of(pipeline))
    return generate(pipeline, request, range(2), 0)


def quantize(pipeline, **arguments):
    arguments = {"calibration": SMALL, "prompts": PROMPTS, "inputs": inputs_of(pipeline)} | arguments
    return stepquant.quantize(pipeline, "w8a8", **arguments)


def denoiser_of(pipeline) -> nn.Module:
    return getattr(pipeline, denoiser_name(pipeline))


def description_of(pipeline):
    request = make_request(pipeline, 2, prompts=PROMPTS, size=16, inputs=inputs_of(pipeline))
    return describe_component(pipeline, denoiser_name(pipeline), request)


def test_blocks_are_complete_and_in_execution_order(pipeline):
    model = denoiser_of(pipeline)
    description = description_of(pipeline)
    ran: list[str] = []
    handles = [
        model.get_submodule(block).register_forward_pre_hook(lambda *_, block=block: ran.append(block))
        for block in description.blocks
    ]
    images(pipeline)
    for handle in handles:
        handle.remove()
    assert ran[: len(description.blocks)] == list(description.blocks)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert set(description.layers) == layers and len(description.layers) == len(layers)
    assert {*description.firsts, *description.lasts} <= layers and description.time_layers <= layers
    assert description.attentions and model.get_submodule(description.middle)


def test_time_layers_depend_only_on_the_timestep(pipeline):
    """With other images and prompts, the inputs of time layers stay the same; those of other layers change."""
    model = denoiser_of(pipeline)
    description = description_of(pipeline)
    seen: dict[str, list[torch.Tensor]] = {layer: [] for layer in description.layers}
    handles = [
        model.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, layer=layer: seen[layer].append(args[0][-1:].clone())
        )
        for layer in description.layers
    ]
    for index, prompt in enumerate(PROMPTS):
        request = make_request(pipeline, 2, prompts=[prompt], size=16 + 8 * index, inputs=inputs_of(pipeline))
        generate(pipeline, request, [index], 0)
    for handle in handles:
        handle.remove()
    same = {layer for layer, inputs in seen.items() if torch.equal(inputs[0], inputs[len(inputs) // 2])}
    guidance = {layer for layer in same if "guidance_embedder" in layer}  # its scale is the pipeline's default
    assert same - guidance - {layer for layer in same if "aspect_ratio" in layer} == set(description.time_layers)


def test_quantize_save_load_and_sample(pipeline, tmp_path):
    quantized = quantize(pipeline, recipe="q-diffusion", hyperparameters={"iterations": 1})
    layers = quantized_modules(denoiser_of(quantized))
    assert set(layers) == set(description_of(pipeline).layers)
    processors = [
        module for module in denoiser_of(quantized).modules() if isinstance(module, QuantizedAttentionProcessor)
    ]
    assert processors and all(
        set(processor.formats) == {"query", "key", "value", "probability"} for processor in processors
    )
    shadow = Shadow(denoiser_of(pipeline), denoiser_of(quantized))
    with shadow:
        expected = images(pipeline)
    assert max(shadow.step_error) < 0.1
    assert torch.isfinite(expected).all()
    quantized.save_pretrained(tmp_path / "model")
    for loaded in (stepquant.load(tmp_path / "model"), DiffusionPipeline.from_pretrained(tmp_path / "model")):
        assert torch.equal(images(loaded), images(quantized))


def test_unquantized_joint_attention_equals_diffusers(tmp_path):
    """Same operands, same result, for both kinds of joint attention."""
    for build in (tiny.sd3, tiny.flux):
        pipeline = build(tmp_path / build.__name__)
        copied = copy.copy(pipeline)
        model = copy.deepcopy(pipeline.transformer)
        for name in description_of(pipeline).attentions:
            model.get_submodule(name).set_processor(QuantizedAttentionProcessor())
        copied.transformer = model
        assert torch.allclose(images(copied), images(pipeline), atol=1e-4)


def test_tdq_on_flux_has_a_row_for_every_timestep(tmp_path):
    """Flux receives t / 1000."""
    pipeline = tiny.flux(tmp_path)
    quantized = quantize(pipeline, recipe="tdq", hyperparameters={"iterations": 1})
    timesteps = quantized.transformer.config.quantization_config["structure"]["timesteps"]
    assert len(timesteps) == 1000 and max(timesteps) == pytest.approx(1.0)
    assert torch.isfinite(images(quantized)).all()


@pytest.fixture(scope="module")
def quantized_text(text_pipeline):
    return stepquant.quantize(text_pipeline, "w8a8", recipe="minmax", calibration=SMALL, prompts=PROMPTS)


def close(produced, expected):
    return 0 < (produced - expected).abs().mean() < 0.2


@pytest.mark.parametrize("kind", ["img2img", "inpaint"])
def test_pipelines_that_start_from_an_image_use_the_quantized_denoiser(kind, text_pipeline, quantized_text):
    name = {"img2img": "StableDiffusionImg2ImgPipeline", "inpaint": "StableDiffusionInpaintPipeline"}[kind]
    arguments = {"prompt": "a", "image": torch.rand(1, 3, 16, 16), "strength": 0.8, "num_inference_steps": 3}
    if kind == "inpaint":
        arguments |= {"mask_image": torch.ones(1, 1, 16, 16), "height": 16, "width": 16}
    results = []
    for source in (text_pipeline, quantized_text):
        pipeline = getattr(diffusers, name)(**source.components, requires_safety_checker=False)
        generator = torch.Generator().manual_seed(0)
        results.append(torch.from_numpy(pipeline(**arguments, generator=generator, output_type="np").images))
    assert close(results[1], results[0])


def test_inpainting_has_additional_channels_and_needs_an_image(text_pipeline):
    components = {name: part for name, part in text_pipeline.components.items() if name != "unet"}
    pipeline = diffusers.StableDiffusionInpaintPipeline(
        **components, unet=tiny.unet(in_channels=9), requires_safety_checker=False
    )
    with pytest.raises(StepquantError, match="it also takes image, mask_image"):
        stepquant.quantize(pipeline, "w8a8", recipe="minmax", calibration=SMALL)
    with pytest.raises(StepquantError, match="not an argument of"):
        stepquant.quantize(pipeline, "w8a8", recipe="minmax", calibration=SMALL, inputs={"magic": 1})
    inputs = {"image": torch.rand(1, 3, 16, 16), "mask_image": torch.ones(1, 1, 16, 16)}
    quantized = quantize(pipeline, recipe="minmax", inputs=inputs)
    assert quantized_modules(quantized.unet)["conv_in"].in_channels == 9
    request = make_request(pipeline, 2, prompts=PROMPTS, size=16, inputs=inputs)
    assert close(generate(quantized, request, range(2), 0), generate(pipeline, request, range(2), 0))


def test_calibration_includes_the_controlnet(text_pipeline):
    """Its residuals of the skip connections are arguments of the denoiser."""
    controlnet = diffusers.ControlNetModel.from_unet(text_pipeline.unet, conditioning_embedding_out_channels=(8, 8))
    for parameter in controlnet.controlnet_down_blocks.parameters():
        nn.init.normal_(parameter)
    components = text_pipeline.components
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        **components, controlnet=controlnet.eval(), requires_safety_checker=False
    )
    inputs = {"image": torch.rand(1, 3, 16, 16)}
    quantized = quantize(pipeline, recipe="q-diffusion", hyperparameters={"iterations": 1}, inputs=inputs)
    request = make_request(pipeline, 2, prompts=PROMPTS, size=16, inputs=inputs)
    shadow = Shadow(pipeline.unet, quantized.unet)
    with shadow:
        generate(pipeline, request, range(2), 0)
    assert max(shadow.step_error) < 0.1
    without = quantize(text_pipeline, recipe="q-diffusion", hyperparameters={"iterations": 1})
    blind = Shadow(pipeline.unet, without.unet)
    with blind:
        generate(pipeline, request, range(2), 0)
    assert max(blind.step_error) > 2 * max(shadow.step_error)


def test_few_step_sampling_with_the_lcm_scheduler(quantized_text):
    pipeline = copy.copy(quantized_text)
    pipeline.scheduler = diffusers.LCMScheduler.from_config(quantized_text.scheduler.config)
    produced = images(pipeline, steps=2)
    assert torch.isfinite(produced).all()
