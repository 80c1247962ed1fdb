"""LoRA beside quantized layers, by the methods of diffusers; and IP-Adapter."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import stepquant
from stepquant.errors import StepquantError
from stepquant.layers.quantized import quantized_modules
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request

SMALL = stepquant.Calibration(samples=4, steps=2)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]


@pytest.fixture(scope="module")
def quantized(text_pipeline):
    return stepquant.quantize(text_pipeline, "w8a8", recipe="minmax", calibration=SMALL)


@pytest.fixture
def fresh(quantized):
    pipeline = copy.copy(quantized)
    pipeline.unet = copy.deepcopy(quantized.unet)
    return pipeline


def write_lora(model, pipeline_class, folder, targets=TARGETS, seed=0, kind="unet"):
    """A LoRA of rank 2 with random weights, as training would have saved it."""
    model = copy.deepcopy(model)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=targets))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    pipeline_class.save_lora_weights(folder, **{f"{kind}_lora_layers": get_peft_model_state_dict(model)})
    return folder


@pytest.fixture(scope="module")
def lora(text_pipeline, tmp_path_factory):
    return write_lora(text_pipeline.unet, StableDiffusionPipeline, tmp_path_factory.mktemp("lora"))


def images(pipeline):
    return generate(pipeline, make_request(pipeline, 2), range(2), 0)


def test_adapter_has_the_same_effect_as_in_full_precision(text_pipeline, fresh, lora):
    plain = copy.copy(text_pipeline)
    plain.unet = copy.deepcopy(text_pipeline.unet)
    quantized_names = set(quantized_modules(fresh.unet))
    before = (images(plain), images(fresh))
    for pipeline in (plain, fresh):
        pipeline.load_lora_weights(lora)
    after = (images(plain), images(fresh))
    effect = (after[0] - before[0]).abs().mean()
    assert effect > 0.02
    assert (after[1] - after[0]).abs().mean() < 0.5 * effect
    names = {name for name, _ in fresh.unet.named_modules() if name.endswith(".lora_A.default_0")}
    assert len(names) == sum(name.endswith(tuple(TARGETS)) for name in quantized_names)


def test_missing_peft(fresh, lora, monkeypatch):
    monkeypatch.setattr("stepquant.layers.lora.find_spec", lambda name: None)
    with pytest.raises(StepquantError, match=r"pip install 'stepquant\[lora\]'"):
        fresh.load_lora_weights(lora)


def test_adapters_are_disabled_weighted_mixed_and_unloaded(quantized, fresh, text_pipeline, lora, tmp_path):
    untouched = images(quantized)
    fresh.load_lora_weights(lora, adapter_name="one")
    with_one = images(fresh)
    fresh.disable_lora()
    assert torch.equal(images(fresh), untouched)
    fresh.enable_lora()
    assert torch.equal(images(fresh), with_one)
    fresh.set_adapters(["one"], adapter_weights=[0.0])
    assert torch.allclose(images(fresh), untouched, atol=1e-6)
    other = write_lora(text_pipeline.unet, StableDiffusionPipeline, tmp_path, targets=["to_q", "ff.net.2"], seed=1)
    fresh.load_lora_weights(other, adapter_name="two")
    fresh.set_adapters(["one", "two"], adapter_weights=[0.5, 0.5])
    mixed = images(fresh)
    assert not torch.allclose(mixed, with_one, atol=1e-3)
    fresh.unload_lora_weights()
    assert torch.equal(images(fresh), untouched)
    assert set(quantized_modules(fresh.unet)) == set(quantized_modules(quantized.unet))


def test_adapter_loads_after_from_pretrained(quantized, lora, tmp_path):
    quantized.save_pretrained(tmp_path / "model")
    results = []
    for pipeline in (stepquant.load(tmp_path / "model"), DiffusionPipeline.from_pretrained(tmp_path / "model")):
        pipeline.load_lora_weights(lora)
        results.append(images(pipeline))
    assert torch.equal(*results) and not torch.equal(results[0], images(quantized))


def test_adapter_fused_before_quantization(text_pipeline, lora):
    """The other way: merged into the full-precision weights, then quantized with them."""
    plain = copy.copy(text_pipeline)
    plain.unet = copy.deepcopy(text_pipeline.unet)
    plain.load_lora_weights(lora)
    plain.fuse_lora()
    plain.unload_lora_weights()
    quantized = stepquant.quantize(plain, "w8a8", recipe="minmax", calibration=SMALL)
    effect = (images(plain) - images(text_pipeline)).abs().mean()
    assert (images(quantized) - images(plain)).abs().mean() < 0.5 * effect


def test_unsupported_operations(fresh, lora, text_pipeline, tmp_path):
    fresh.load_lora_weights(lora)
    with pytest.raises(StepquantError, match="fuse it into the full-precision pipeline"):
        fresh.fuse_lora()
    fresh.unload_lora_weights()
    wider = write_lora(tiny.unet(block_out_channels=(16, 16)), StableDiffusionPipeline, tmp_path / "wider")
    with pytest.raises(
        StepquantError, match=r"the LoRA does not fit this UNet2DConditionModel: .*size mismatch"
    ) as caught:
        fresh.load_lora_weights(wider)
    assert "\n" not in str(caught.value)
    weights = {"unet.no_such.lora_A.weight": torch.zeros(2, 8), "unet.no_such.lora_B.weight": torch.zeros(8, 2)}
    with pytest.raises(StepquantError, match="does not fit"):
        fresh.load_lora_weights(weights)
    assert torch.isfinite(images(fresh)).all()


@pytest.mark.parametrize("family", ["SD3", "Flux dev"])
def test_adapters_for_transformers(family, tmp_path):
    pipeline = tiny.FAMILIES[family](tmp_path / "model")
    pipeline.transformer.save_pretrained(tmp_path / "transformer")
    config = stepquant.StepquantConfig("w8a16")
    quantized = copy.copy(pipeline)
    quantized.transformer = type(pipeline.transformer).from_pretrained(
        tmp_path / "transformer", quantization_config=config
    )
    request = make_request(pipeline, 2, prompts=["a"], size=16, inputs={"max_sequence_length": 8})
    before = generate(quantized, request, [0], 0)
    folder = write_lora(
        pipeline.transformer, type(pipeline), tmp_path / "lora", targets=["to_q", "to_k"], kind="transformer"
    )
    if family == "SD3":
        quantized.load_lora_weights(folder)
    else:  # diffusers' loader for the whole Flux pipeline reads the shapes of weights in full precision
        quantized.transformer.load_lora_adapter(folder / "pytorch_lora_weights.safetensors")
    after = generate(quantized, request, [0], 0)
    assert not torch.allclose(before, after, atol=1e-3)
    quantized.unload_lora_weights()
    assert torch.equal(generate(quantized, request, [0], 0), before)


IMAGE = 12
"""Width of an image's embedding."""


def ip_adapter(unet, tokens: int = 4) -> dict:
    """An IP-Adapter as its authors store it: a projection of the image, and key and value of each cross-attention."""
    torch.manual_seed(5)
    width = unet.config.cross_attention_dim
    projection = {
        "proj.weight": 0.3 * torch.randn(tokens * width, IMAGE), "proj.bias": torch.zeros(tokens * width),
        "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width),
    }  # fmt: skip
    attentions = {}
    for index, name in enumerate(unet.attn_processors):
        if ".attn2." in name:
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            for operand in "kv":
                attentions[f"{index}.to_{operand}_ip.weight"] = torch.randn(hidden, width)
    return {"image_proj": projection, "ip_adapter": attentions}


def test_ip_adapter_has_the_same_effect_as_in_full_precision(text_pipeline, fresh):
    plain = copy.copy(text_pipeline)
    plain.unet = copy.deepcopy(text_pipeline.unet)
    adapter = ip_adapter(text_pipeline.unet)
    image = torch.randn(2, 1, IMAGE)  # of the negative prompt, and of the prompt

    def drawn(pipeline):
        generator = torch.Generator().manual_seed(0)
        given = {"ip_adapter_image_embeds": [image]} if pipeline.unet.encoder_hid_proj is not None else {}
        return torch.from_numpy(
            pipeline("a", num_inference_steps=2, generator=generator, output_type="np", **given).images
        )

    before = (drawn(plain), drawn(fresh))
    for pipeline in (plain, fresh):
        pipeline.register_modules(image_encoder=None)
        pipeline.load_ip_adapter(
            copy.deepcopy(adapter), subfolder=None, weight_name=None, image_encoder_folder=None, low_cpu_mem_usage=False
        )
        pipeline.set_ip_adapter_scale(0.1)  # random weights at full scale leave the calibrated ranges
    after = (drawn(plain), drawn(fresh))
    effect = (after[0] - before[0]).abs().mean()
    assert effect > 0.01
    assert (after[1] - after[0]).abs().mean() < 0.5 * effect
    # Attentions of its own, and bare ones of the class that it found: their operands stay in floating point.
    processors = {type(processor).__name__ for processor in fresh.unet.attn_processors.values()}
    assert processors == {"IPAdapterAttnProcessor2_0", "QuantizedAttentionProcessor"}
    fresh.set_ip_adapter_scale(0.0)
    assert (drawn(fresh) - before[1]).abs().mean() < 0.5 * effect
    fresh.unload_ip_adapter()
    assert (drawn(fresh) - before[1]).abs().mean() < 0.5 * effect
    assert quantized_modules(fresh.unet)
