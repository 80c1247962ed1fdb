"""The observed execution order against that of the architectures."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from stepquant.models.tracing import execution_order, fed_by_block_input


def flux():
    """A Flux transformer and one direct call of it, without a pipeline."""
    torch.manual_seed(0)
    model = tiny.flux_transformer()
    arguments = {
        "hidden_states": torch.randn(1, 4, 16),
        "encoder_hidden_states": torch.randn(1, 3, tiny.WIDTH),
        "pooled_projections": torch.randn(1, tiny.WIDTH),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    return model, lambda: model(**arguments)


def only(order: list[str], *names: str) -> list[str]:
    return [name for name in order if name in names]


def test_proj_out_executes_last_in_a_single_block_of_flux():
    """Registered: proj_mlp, proj_out, attn. Executed: proj_out reads what attention and MLP computed."""
    model, call = flux()
    order = execution_order(model, call)
    block = "single_transformer_blocks.0"
    layers = [f"{block}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_out")]
    assert only(order, *layers) == layers
    registered = [name for name, _ in model.named_modules()]
    assert only(registered, *layers) != layers
    assert order.index(f"{block}.proj_mlp") < order.index(f"{block}.proj_out")
    assert order[0] == "x_embedder" and order[-1] == "proj_out"


@pytest.mark.parametrize("name", ["down_blocks.1.resnets.0", "up_blocks.1.resnets.1"])
def test_the_shortcut_of_a_residual_block_reads_the_input_of_the_block(name, text_pipeline):
    """diffusers runs the shortcut after both convolutions; the last of the chain is still ``conv2``."""
    unet = text_pipeline.unet
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)

    def call() -> None:
        unet(x, 3, text)

    chain = ["norm1", "conv1", "time_emb_proj", "norm2", "conv2"]
    order = execution_order(unet.get_submodule(name), call)
    assert only(order, *chain, "conv_shortcut") == [*chain, "conv_shortcut"]
    fed = fed_by_block_input(unet.get_submodule(name), call)
    assert only(fed, "conv_shortcut", "norm1", "conv1", "conv2") == ["norm1", "conv_shortcut"]
    assert only(execution_order(unet, call), "conv_in", "mid_block", "conv_out") == ["conv_in", "mid_block", "conv_out"]


def test_unused_modules_are_absent_and_hooks_are_removed():
    model = nn.ModuleDict({"unused": nn.Linear(2, 2), "second": nn.Linear(2, 2), "first": nn.Linear(2, 2)})
    x = torch.ones(1, 2)

    def call() -> None:
        for name in ("first", "second", "first"):
            model[name](x)

    assert execution_order(model, call) == ["first", "second"]

    def failing() -> None:
        call()
        raise KeyError

    with pytest.raises(KeyError):
        execution_order(model, failing)
    assert not any(module._forward_pre_hooks for module in model.modules())
