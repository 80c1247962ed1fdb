"""Features of the classic families: integer runtime, LoRA, offloading; `tests.families` has all families."""

from __future__ import annotations

import copy
import inspect

import pytest
import tiny
import torch
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import stepquant
from stepquant.layers.quantized import quantized_modules
from stepquant.models import denoiser_name
from stepquant.pipelines.call import kind_of
from stepquant.pipelines.description import describe_component
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.runtime import fallbacks, native, prepare

FIXTURES = {"DDPM": "unconditional_pipeline", "DiT": "class_pipeline", "Stable Diffusion 1": "text_pipeline"}


@pytest.fixture(scope="module", params=[*FIXTURES, *tiny.FAMILIES])
def pipeline(request, tmp_path_factory):
    if request.param in FIXTURES:
        return request.getfixturevalue(FIXTURES[request.param])
    return tiny.FAMILIES[request.param](tmp_path_factory.mktemp("family"))


def options(pipeline) -> dict:
    """Prompts and a short text length, for pipelines that take them."""
    takes = inspect.signature(type(pipeline).__call__).parameters
    return {
        "prompts": ["a red bicycle", "a"] if kind_of(pipeline) == "text" else None,
        "inputs": {"max_sequence_length": 8} if "max_sequence_length" in takes else {},
    }


def size(pipeline) -> int | None:
    return 16 if "height" in inspect.signature(type(pipeline).__call__).parameters else None


def images(pipeline):
    return generate(pipeline, make_request(pipeline, 2, size=size(pipeline), **options(pipeline)), range(2), 0)


@pytest.fixture(scope="module")
def quantized(pipeline):
    calibration = stepquant.Calibration(samples=8, steps=2, size=size(pipeline))
    return stepquant.quantize(pipeline, "w8a8", recipe="minmax", calibration=calibration, **options(pipeline))


@pytest.fixture(scope="module")
def folder(quantized, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    quantized.save_pretrained(folder)
    return folder


def denoiser_of(pipeline):
    return getattr(pipeline, denoiser_name(pipeline))


def description_of(pipeline):
    request = make_request(pipeline, 2, size=size(pipeline), **options(pipeline))
    return describe_component(pipeline, denoiser_name(pipeline), request)


def test_quantize(pipeline, quantized):
    assert set(quantized_modules(denoiser_of(quantized))) == set(description_of(pipeline).layers)


def test_save(folder):
    assert (folder / "stepquant.json").is_file() and (folder / "README.md").is_file()


def test_load(folder, quantized):
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert torch.equal(images(loaded), images(quantized))
    assert torch.equal(images(stepquant.load(folder)), images(quantized))


def test_sample(pipeline, quantized):
    produced, expected = images(quantized), images(pipeline)
    assert torch.isfinite(produced).all() and produced.shape == expected.shape
    assert 0 < (produced - expected).abs().mean() < 0.2


def test_int8_runtime(pipeline, quantized):
    """Every layer but the first, whose input stays in floating point, has a native kernel."""
    denoiser = copy.deepcopy(denoiser_of(quantized))
    if (reason := native.supported()) is not None:
        pytest.skip(reason)
    prepare(denoiser, "native")
    assert fallbacks(denoiser) == list(description_of(pipeline).firsts)


def test_lora(pipeline, quantized, tmp_path):
    """With the methods of the model, which those of the pipeline call."""
    if not hasattr(denoiser_of(pipeline), "load_lora_adapter"):
        pytest.skip("diffusers has no LoRA for this model")
    trained = copy.deepcopy(denoiser_of(pipeline))
    trained.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=["to_q", "to_v"]))
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted = copy.copy(quantized)
    setattr(adapted, denoiser_name(pipeline), copy.deepcopy(denoiser_of(quantized)))
    before = images(adapted)
    denoiser_of(adapted).load_lora_adapter(get_peft_model_state_dict(trained), prefix=None)
    assert not torch.allclose(images(adapted), before, atol=1e-4)
    denoiser_of(adapted).unload_lora()
    assert torch.equal(images(adapted), before)


def test_offload(quantized):
    """Sequential offloading: the parameters of a module are loaded only while it runs; here the device is the CPU."""
    offloaded = copy.copy(quantized)
    denoiser = copy.deepcopy(denoiser_of(quantized))
    setattr(offloaded, denoiser_name(quantized), denoiser)
    cpu_offload(denoiser, execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in denoiser.parameters())
    # Blocks are not fused while the parameters of their norms are offloaded, so codes may round differently.
    assert (images(offloaded) - images(quantized)).abs().mean() < 0.01
