"""Data flow of small modules, where it is obvious, and of denoisers of diffusers, where it is known."""

from __future__ import annotations

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stepquant.models.dataflow import trace
from stepquant.models.description import describe


class Small(nn.Module):
    """A denoiser with one of everything; `body` computes ``(x, time, text) -> output``."""

    def __init__(self, body, **layers: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x, timestep, text=None):
        return self.body(self, x, timestep, text)


def linears(*names: str) -> dict[str, nn.Module]:
    return {name: nn.Linear(4, 4) for name in names}


def traced(body, x=None, text=None, **layers):
    x = torch.randn(2, 4) if x is None else x
    return trace(Small(body, **layers), {"x": x, "timestep": torch.tensor([3.0, 3.0]), "text": text})


def test_a_residual_stream_comes_from_every_layer_that_adds_to_it():
    def body(model, x, timestep, text):
        hidden = model.first(x)
        hidden = hidden + model.time(timestep[:, None].expand(-1, 4))
        return model.last(F.silu(hidden))

    flow = traced(body, **linears("last", "time", "first"))
    assert list(flow.inputs) == ["first", "time", "last"], "not in execution order"
    assert flow.inputs["time"].arguments == {"timestep"} and not flow.inputs["time"].layers
    assert flow.inputs["last"].layers == {"first", "time"} and flow.inputs["last"].arguments == {"x", "timestep"}
    assert flow.outputs[0].layers == {"last"}
    assert flow.ancestors["last"] == {"first", "time"}


def test_views_and_operations_in_place_change_what_they_are_views_of():
    def body(model, x, timestep, text):
        buffer = torch.zeros(2, 8)
        buffer[:, :4] = model.first(x)
        left, right = buffer.chunk(2, dim=1)
        right.add_(timestep[:, None])
        return model.last(left.reshape(4, 2).t().reshape(2, 4))

    flow = traced(body, **linears("first", "last"))
    assert flow.inputs["last"].layers == {"first"}
    assert flow.inputs["last"].arguments == {"x", "timestep"}


def test_the_shape_of_a_tensor_is_not_its_value():
    def body(model, x, timestep, text):
        same = model.first(torch.ones_like(x) * timestep[0]) + model.second(x.new_zeros(2, 4))
        return model.last(same) + x

    flow = traced(body, **linears("first", "second", "last"))
    assert flow.inputs["first"].arguments == {"timestep"}
    assert flow.inputs["second"].arguments == frozenset()
    assert flow.outputs[0].arguments == {"x", "timestep"}


def test_arguments_of_any_structure_are_named_by_paths():
    def body(model, x, timestep, text):
        return [model.first(part) for part in x], {"pooled": model.second(text["pooled"])}

    flow = traced(
        body, x=[torch.randn(1, 4), torch.randn(3, 4)], text={"pooled": torch.randn(1, 4)}, **linears("first", "second")
    )
    assert flow.inputs["first"].arguments == {"x.0", "x.1"}
    assert flow.inputs["second"].arguments == {"text.pooled"}
    assert [output.layers for output in flow.outputs] == [{"first"}, {"first"}, {"second"}]


def test_tensors_that_share_memory_are_separate_arguments():
    def body(model, x, timestep, text):
        return model.first(x) + model.second(text)

    x = torch.randn(2, 4)
    flow = traced(body, x=x, text=x, **linears("first", "second"))
    assert flow.inputs["first"].arguments == {"x"} and flow.inputs["second"].arguments == {"text"}


def skip_model(order=(0, 1), permuted=False):
    def body(model, x, timestep, text):
        skip = model.down(x)
        trunk = model.middle(F.silu(skip))
        joined = torch.cat([(trunk, skip)[index] for index in order], dim=1)
        joined = F.silu(model.norm(joined))
        return model.up(joined.permute(0, 2, 3, 1) if permuted else joined)

    up = nn.Linear(10, 4) if permuted else nn.Conv2d(10, 4, 1)
    return body, {
        "down": nn.Conv2d(4, 4, 1), "middle": nn.Conv2d(4, 6, 1), "norm": nn.GroupNorm(2, 10), "up": up,
    }  # fmt: skip


@pytest.mark.parametrize("permuted", [False, True])
def test_a_skip_concatenation_is_split_where_the_trunk_ends(permuted):
    body, layers = skip_model(permuted=permuted)
    flow = traced(body, x=torch.randn(2, 4, 3, 3), **layers)
    assert flow.splits == {"up": 6} and flow.before_first_skip == "middle"


def test_parallel_branches_and_rotary_embeddings_are_not_skip_concatenations():
    def body(model, x, timestep, text):
        left, right = model.first(x), model.second(x)
        rotated = torch.cat([-left[:, 2:], left[:, :2]], dim=-1)
        return model.third(torch.cat([left, right], dim=-1)) + model.fourth(rotated)

    flow = traced(body, third=nn.Linear(8, 4), **linears("first", "second", "fourth"))
    assert flow.splits == {}


def test_attention_is_attributed_to_the_innermost_module():
    class Attention(nn.Module):
        def forward(self, q, manual):
            if manual:
                return torch.softmax(q @ q.transpose(-1, -2), dim=-1) @ q
            return F.scaled_dot_product_attention(q, q, q) + F.scaled_dot_product_attention(q, q, q)

    def body(model, x, timestep, text):
        q = model.first(x).view(1, 1, 2, 4)
        return model.manual(model.outer(q, False), True)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, *args):
            return self.inner(*args)

    flow = traced(body, outer=Outer(), manual=Attention(), **linears("first"))
    assert flow.attentions == {"outer.inner": 2}
    assert list(flow.manual_attentions) == ["manual"]


def test_hooks_are_removed_after_an_error():
    def body(model, x, timestep, text):
        model.first(x)
        raise KeyError

    model = Small(body, **linears("first"))
    with pytest.raises(KeyError):
        trace(model, {"x": torch.randn(2, 4), "timestep": torch.zeros(2)})
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def unet(**config):
    torch.manual_seed(0)
    shape = {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 2, "block_out_channels": (8, 16),
        "norm_num_groups": 4, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8,
    }  # fmt: skip
    return diffusers.UNet2DModel(**(shape | config)).eval()


def test_skip_splits_of_a_unet_are_its_channels():
    """diffusers: a residual block of an up block reads the trunk first, then what the down path put out."""
    flow = trace(unet(), {"sample": torch.randn(1, 3, 8, 8), "timestep": torch.tensor(5)})
    found = [flow.splits[f"up_blocks.{stage}.resnets.{index}.conv1"] for stage in (0, 1) for index in (0, 1, 2)]
    assert found == [16, 16, 16, 16, 8, 8]
    assert len(flow.splits) == 12, "the shortcut of each reads the same"


def test_an_embedding_of_the_class_counts():
    """The class embedding is an `nn.Embedding`, which has no layer, and is added to that of the timestep."""
    arguments = {"sample": torch.randn(1, 3, 8, 8), "timestep": torch.tensor(5)}
    alone = describe(unet(), arguments).time_layers
    assert "mid_block.resnets.0.time_emb_proj" in alone
    labelled = describe(unet(num_class_embeds=10), arguments | {"class_labels": torch.tensor([3])}).time_layers
    assert labelled == {"time_embedding.linear_1", "time_embedding.linear_2"}
