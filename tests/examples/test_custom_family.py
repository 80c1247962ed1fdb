from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from torch import nn

import stepquant
from stepquant import models
from stepquant.errors import StepquantError
from stepquant.user_code import load_function

describe_auraflow = load_function(
    f"{Path(__file__).parents[2] / 'examples' / 'custom_family.py'}:describe_auraflow", "description"
)
INPUTS = {"max_sequence_length": 8}


@pytest.fixture(scope="module")
def pipeline() -> diffusers.AuraFlowPipeline:
    """AuraFlow in miniature; never modify it, copy it."""
    torch.manual_seed(3)
    tokenizer, text_encoder = tiny.t5()
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=tiny.WIDTH, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=tiny.autoencoder(), transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


@pytest.fixture
def registered(monkeypatch):
    """Register the family for one test."""
    monkeypatch.setattr(models, "FAMILIES", dict(models.FAMILIES))
    models.register(diffusers.AuraFlowTransformer2DModel, describe_auraflow)


def generate(pipeline, seed: int = 0, **arguments):
    generator = torch.Generator().manual_seed(seed)
    call = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np", "generator": generator} | INPUTS
    return torch.from_numpy(pipeline("a red bicycle", **(call | arguments)).images)


def test_blocks_are_in_execution_order(pipeline):
    description, ran = describe_auraflow(pipeline.transformer), []
    handles = [
        pipeline.transformer.get_submodule(block).register_forward_pre_hook(lambda *_, block=block: ran.append(block))
        for block in description.blocks
    ]
    generate(pipeline, num_inference_steps=1)
    for handle in handles:
        handle.remove()
    assert ran == list(description.blocks)


def test_time_layers_depend_only_on_the_timestep(pipeline):
    description = describe_auraflow(pipeline.transformer)
    seen: dict[str, list[torch.Tensor]] = {layer: [] for layer in description.layers}
    handles = [
        pipeline.transformer.get_submodule(layer).register_forward_pre_hook(
            lambda _, args, layer=layer: seen[layer].append(args[0][-1].clone())
        )
        for layer in description.layers
    ]
    for seed, prompt in enumerate(["a", "a red bicycle"]):
        generator = torch.Generator().manual_seed(seed)
        pipeline(prompt, num_inference_steps=1, height=16, width=16, generator=generator, **INPUTS)
    for handle in handles:
        handle.remove()
    fixed = {layer for layer, (first, second) in seen.items() if torch.equal(first, second)}
    assert fixed == description.time_layers


@pytest.mark.usefixtures("registered")
def test_the_family_is_quantized_and_loads_without_its_description(pipeline, tmp_path, monkeypatch):
    quantized = stepquant.quantize(
        pipeline, "w8a8", recipe=stepquant.recipes.QDiffusion(iterations=2), prompts=["a red bicycle", "a"],
        inputs=INPUTS, calibration=stepquant.Calibration(samples=8, steps=2, size=16),
    )  # fmt: skip
    stepquant.save(quantized, tmp_path / "model")
    images = generate(quantized)
    assert 0 < (images - generate(pipeline)).abs().mean() < 0.05
    monkeypatch.undo()
    assert torch.equal(generate(stepquant.load(tmp_path / "model")), images)


@pytest.mark.usefixtures("registered")
def test_a_family_has_one_description(pipeline):
    models.register(diffusers.AuraFlowTransformer2DModel, describe_auraflow)
    assert models.describe(pipeline.transformer).family == "AuraFlow"
    with pytest.raises(
        StepquantError, match=r"UNet2DModel is already described by stepquant\.models\.unet\.describe_unet"
    ):
        models.register(diffusers.UNet2DModel, describe_auraflow)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"blocks": ["first", "body.0"]}, r"outside of the blocks of the small description: body\.2"),
        ({"blocks": ["first", "body", "body.0"]}, r"overlapping blocks: body\.0"),
        ({"blocks": ["first", "bodies"]}, "'bodies', which is not a module of this Small"),
        ({"middle": "centre"}, "'centre', which is not a module"),
        ({"first": "body"}, "'body', which is not a linear or convolution"),
        ({"time_layers": ["body.1"]}, r"'body\.1', which is not a linear or convolution"),
        ({"skip_splits": {"skip": 1}}, "'skip', which is not a linear or convolution"),
    ],
)
def test_an_invalid_description_is_rejected(changed, reason):
    fitting = {"blocks": ["first", "body"], "first": "first", "last": "body.2", "time_layers": [], "middle": "body"}
    assert models.describe_blocks(Small(), "small", **fitting).layers == ("first", "body.0", "body.2")
    with pytest.raises(StepquantError, match=reason):
        models.describe_blocks(Small(), "small", **(fitting | changed))
