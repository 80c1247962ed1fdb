"""Descriptions of families of diffusers: known first and last layers, blocks that run once, observed time layers."""

from __future__ import annotations

import functools
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepquant.models.description import TIME_ARGUMENTS, describe
from stepquant.pipelines.description import describe_component
from stepquant.pipelines.recording import record_calls
from stepquant.pipelines.request import make_request
from tests.families.registry import FAMILIES

KNOWN = {
    "FLUX.2 dev": ("x_embedder", "proj_out"),
    "Chroma": ("x_embedder", "proj_out"),
    "Qwen-Image": ("img_in", "proj_out"),
    "Z-Image": ("all_x_embedder.2-1", "all_final_layer.2-1.linear"),
    "Wan 2.1": ("patch_embedding", "proj_out"),
    "LTX-Video": ("proj_in", "proj_out"),
    "LTX-2": ("proj_in audio_proj_in", "proj_out audio_proj_out"),
    "HunyuanVideo": ("x_embedder.proj", "proj_out"),
    "Sana": ("patch_embed.proj", "proj_out"),
    "Lumina 2": ("x_embedder", "norm_out.linear_2"),
    "CogVideoX": ("patch_embed.proj", "proj_out"),
    "Stable Cascade decoder": ("embedding.1", "clf.1"),
    "AuraFlow": ("pos_embed.proj", "proj_out"),
    "HiDream": ("x_embedder.proj", "final_layer.linear"),
    "Stable Audio": ("preprocess_conv", "postprocess_conv"),
    "AudioLDM 2": ("conv_in", "conv_out"),
    "Stable Video Diffusion": ("conv_in", "conv_out"),
}
"""Family -> layers that read the noisy sample, and layers that write the output."""

MANY_EMBEDDINGS = {"AuraFlow": 6, "CogVideoX": 5, "Lumina 2": 4, "LTX-2": 15}
"""Family -> fewest time layers, of those that modulate blocks by the timestep alone."""


@functools.cache
def recorded(name):
    """A family's first denoiser, the arguments of its first call, and its description."""
    family = FAMILIES[name]
    pipeline = family.build(Path(tempfile.mkdtemp()))
    request = make_request(pipeline, family.steps, prompts=family.prompts(pipeline), inputs=dict(family.call))
    component = family.denoisers[0]
    call = record_calls(pipeline, component, request, [0], 0)[0]
    return getattr(pipeline, component), call.arguments, describe_component(pipeline, component, request)


@pytest.mark.parametrize("name", KNOWN)
def test_first_and_last_layers_are_those_of_the_architecture(name):
    _, _, description = recorded(name)
    assert (" ".join(description.firsts), " ".join(description.lasts)) == KNOWN[name]


@pytest.mark.parametrize("name", KNOWN)
def test_every_layer_is_in_a_block_or_has_a_reason_and_blocks_run_once_in_order(name):
    model, arguments, description = recorded(name)
    ran: list[str] = []
    handles = [
        model.get_submodule(block).register_forward_pre_hook(lambda *_, block=block: ran.append(block))
        for block in description.blocks
    ]
    with torch.no_grad():
        model(**arguments)
    for handle in handles:
        handle.remove()
    assert ran == list(description.blocks)
    layers = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)}
    floats = {path for path in description.unquantized if path in layers}
    assert Counter(description.layers) == Counter(layers - floats)
    for layer in description.layers:
        assert sum(f"{layer}.".startswith(f"{block}.") for block in description.blocks) == 1, layer


@pytest.mark.parametrize("name", KNOWN)
def test_time_layers_are_those_whose_input_does_not_change_with_anything_else(name):
    model, arguments, description = recorded(name)
    changed = {
        key: value if TIME_ARGUMENTS.search(key) else pytree.tree_map_only(Tensor, another, value)
        for key, value in arguments.items()
    }
    seen: dict[str, list[Tensor]] = {path: [] for path, module in model.named_modules() if type(module) is nn.Linear}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: seen[path].append((args or (kwargs["input"],))[0].clone()),
            with_kwargs=True,
        )
        for path in seen
    ]
    with torch.no_grad():
        model(**arguments)
        model(**changed)
    for handle in handles:
        handle.remove()
    halves = {path: (inputs[: len(inputs) // 2], inputs[len(inputs) // 2 :]) for path, inputs in seen.items() if inputs}
    same = {
        path for path, (one, other) in halves.items() if len(one) == len(other) and all(map(torch.equal, one, other))
    }
    constant = {path for path in same if "time_pos_embed" in path}  # reads the numbers of frames
    assert same - constant == set(description.time_layers)
    assert len(same) >= MANY_EMBEDDINGS.get(name, 2)


def another(value: Tensor) -> Tensor:
    """Other noise, other conditions, another scale of guidance; masks and positions stay."""
    return torch.randn_like(value) if value.is_floating_point() and value.unique().numel() != 2 else value


def test_a_controlnet_has_one_first_layer_and_a_last_one_for_each_output():
    family = FAMILIES["Stable Diffusion ControlNet"]
    pipeline = family.build(Path(tempfile.mkdtemp()))
    request = make_request(pipeline, 2, prompts=["a"], inputs=dict(family.call))
    description = describe_component(pipeline, "controlnet", request)
    assert description.firsts == ("conv_in",)
    outputs = len(pipeline.controlnet.controlnet_down_blocks)
    assert description.lasts == (
        *(f"controlnet_down_blocks.{index}" for index in range(outputs)), "controlnet_mid_block",
    )  # fmt: skip


def test_linear_attention_and_float_layers_are_listed_with_the_reason():
    _, _, sana = recorded("Sana")
    assert sana.unquantized == {f"transformer_blocks.{index}.attn1": "linear attention" for index in range(2)}
    _, _, wan = recorded("Wan 2.1")
    assert wan.unquantized["condition_embedder.time_embedder.linear_1"] == "WanTransformer3DModel keeps it in float32"


def test_flow_models_read_time_in_thousandths():
    assert recorded("FLUX.2 dev")[2].time_unit == 1e-3 and recorded("Wan 2.1")[2].time_unit == 1
    assert recorded("Z-Image")[2].timestep == "t" and recorded("HiDream")[2].timestep == "timesteps"


def test_the_description_does_not_depend_on_the_values():
    model, arguments, description = recorded("FLUX.2 dev")
    assert describe(model, pytree.tree_map_only(Tensor, another, arguments), 1000.0) == description


def test_an_attention_that_is_called_for_each_sample_is_one():
    """Mochi; guidance makes two samples of one."""
    _, _, description = recorded("Mochi")
    attentions = [name for name in description.attentions if name.startswith("transformer_blocks")]
    assert attentions == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
