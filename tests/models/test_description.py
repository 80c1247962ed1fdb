"""Descriptions found by data flow against what is known of the architectures, and against observation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stepquant.errors import StepquantError
from stepquant.models import denoiser_name, describe
from tests.described import described, example_call

PIPELINES = ("unconditional_pipeline", "class_pipeline", "text_pipeline")


def denoiser(name, request):
    pipeline = request.getfixturevalue(name)
    return getattr(pipeline, denoiser_name(pipeline))


@pytest.mark.parametrize("name", PIPELINES)
def test_blocks_are_disjoint_complete_and_in_execution_order(name, request):
    model = denoiser(name, request)
    description = described(model)
    ran: list[str] = []
    handles = [
        model.get_submodule(block).register_forward_pre_hook(lambda *_, block=block: ran.append(block))
        for block in description.blocks
    ]
    model(**example_call(model))
    for handle in handles:
        handle.remove()
    assert ran == list(description.blocks)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert sorted(description.layers) == sorted(layers), "every layer in exactly one block"
    assert not description.unquantized


def stage(path: str, *members: str) -> list[str]:
    return [f"{path}.{member}" for member in members]


def test_the_blocks_of_a_unet_are_residual_blocks_attentions_and_samplers(text_pipeline):
    """Transformers are divided into their projections and their blocks."""
    transformer = ("attentions.{0}.proj_in", "attentions.{0}.transformer_blocks.0", "attentions.{0}.proj_out")
    first, second = ([part.format(index) for part in transformer] for index in (0, 1))
    description = described(text_pipeline.unet)
    assert list(description.blocks) == [
        "time_embedding", "conv_in",
        *stage("down_blocks.0", "resnets.0", *first, "downsamplers.0"),
        *stage("down_blocks.1", "resnets.0"),
        *stage("mid_block", "resnets.0", *first, "resnets.1"),
        *stage("up_blocks.0", "resnets.0", "resnets.1", "upsamplers.0"),
        *stage("up_blocks.1", "resnets.0", *first, "resnets.1", *second),
        "conv_out",
    ]  # fmt: skip
    assert (description.firsts, description.lasts, description.middle) == (("conv_in",), ("conv_out",), "mid_block")
    assert len(description.attentions) == 8


def test_the_blocks_of_a_transformer_are_its_blocks_and_what_lies_around_them(class_pipeline):
    description = described(class_pipeline.transformer)
    blocks = ("transformer_blocks.0", "transformer_blocks.1")
    assert description.blocks == ("pos_embed.proj", *blocks, "proj_out_1", "proj_out_2")
    assert (description.firsts, description.lasts) == (("pos_embed.proj",), ("proj_out_2",))
    assert description.middle == "transformer_blocks.1"
    embedder = "norm1.emb.timestep_embedder"
    assert description.time_layers == {f"{block}.{embedder}.linear_{index}" for block in blocks for index in (1, 2)}


@pytest.mark.parametrize("name", PIPELINES)
def test_time_layers_depend_only_on_the_timestep(name, request):
    """With other noise and conditions, the inputs of time layers stay the same; those of other layers change."""
    model = denoiser(name, request)
    description = described(model)
    seen: dict[str, list[torch.Tensor]] = {layer: [] for layer in description.layers}
    handles = [
        model.get_submodule(layer).register_forward_pre_hook(lambda _, args, layer=layer: seen[layer].append(args[0]))
        for layer in description.layers
    ]
    for label in (0, 1):
        arguments = example_call(model)
        model(**arguments | ({"class_labels": torch.tensor([label])} if "class_labels" in arguments else {}))
    for handle in handles:
        handle.remove()
    fixed = {layer for layer, inputs in seen.items() if torch.equal(inputs[0], inputs[len(inputs) // 2])}
    assert fixed == set(description.time_layers)


@pytest.mark.parametrize("name", ["unconditional_pipeline", "text_pipeline"])
def test_skip_splits_match_the_concatenations(name, request, monkeypatch):
    model = denoiser(name, request)
    original, widths = torch.cat, []

    def spy(tensors, dim=0, **kwargs):
        if dim == 1 and len(tensors) == 2 and tensors[0].dim() == 4:
            widths.append((tensors[0].shape[1], tensors[1].shape[1]))
        return original(tensors, dim=dim, **kwargs)

    monkeypatch.setattr(torch, "cat", spy)
    model(**example_call(model))
    monkeypatch.undo()
    splits = described(model).skip_splits
    conv1 = {name: split for name, split in splits.items() if name.endswith("conv1")}
    found = [(split, model.get_submodule(name).in_channels - split) for name, split in conv1.items()]
    assert found == widths and widths


class Custom(nn.Module):
    """A denoiser of a user's own: two modalities, a guidance embedding first, experts side by side, a spare layer."""

    def __init__(self) -> None:
        super().__init__()
        self.guidance, self.spare, self.embed = nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(4, 8)
        self.embed_audio, self.time = nn.Linear(3, 8), nn.Linear(1, 8)
        experts = [nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)) for _ in range(2)]
        self.blocks = nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(experts)}) for _ in range(1))
        self.audio_out, self.out = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, latents, t, audio, guidance):
        condition = self.guidance(guidance) + self.time(t[:, None])
        x, y = self.embed(latents) + condition, self.embed_audio(audio) + condition
        for block in self.blocks:
            x = x + sum(expert(x) for expert in block["experts"])
        return self.out(x), self.audio_out(y)


def test_each_modality_has_a_first_and_a_last_layer():
    arguments = {
        "latents": torch.randn(2, 4), "t": torch.tensor([0.5, 0.5]), "audio": torch.randn(2, 3),
        "guidance": torch.ones(2, 1),
    }  # fmt: skip
    description = describe(Custom(), arguments, scheduler_time=1000)
    assert description.firsts == ("embed", "embed_audio")
    assert description.lasts == ("out", "audio_out")
    assert description.time_layers == {"time"} and description.timestep == "t"
    assert description.time_unit == 1e-3
    assert description.unquantized == {"spare": "was not called"}
    experts = ("blocks.0.experts.0", "blocks.0.experts.1")
    assert description.blocks == ("guidance", "time", "embed", "embed_audio", *experts, "out", "audio_out")


@pytest.mark.parametrize(("time", "scheduler_time", "unit"), [(0.98, 980, 1e-3), (980, 980, 1), (0.98, 0.98, 1)])
def test_the_time_unit_is_read_off_the_call(time, scheduler_time, unit, unconditional_pipeline):
    model = unconditional_pipeline.unet
    assert describe(model, example_call(model) | {"timestep": time}, scheduler_time).time_unit == unit


def test_layers_that_the_class_keeps_in_float32_are_listed(unconditional_pipeline, monkeypatch):
    model = unconditional_pipeline.unet
    monkeypatch.setattr(type(model), "_keep_in_fp32_modules", ["time_embedding"])
    description = described(model)
    assert description.unquantized == dict.fromkeys(
        ("time_embedding.linear_1", "time_embedding.linear_2"), "UNet2DModel keeps it in float32"
    )
    assert not any(name.startswith("time_embedding") for name in (*description.layers, *description.blocks))


def test_what_is_not_a_denoiser_is_rejected():
    with pytest.raises(StepquantError, match="Linear has the parameters input; expected a timestep"):
        describe(nn.Linear(1, 1), {"input": torch.ones(1, 1)})
    with pytest.raises(StepquantError, match="no denoiser"):
        denoiser_name(object())

    class Empty(nn.Module):
        def forward(self, sample, timestep):
            return sample

    with pytest.raises(StepquantError, match="no linear or convolution of Empty reads sample"):
        describe(Empty(), {"sample": torch.ones(1, 1), "timestep": 3})
    with pytest.raises(StepquantError, match="has the arguments sample; expected timestep"):
        describe(Empty(), {"sample": torch.ones(1, 1)})
