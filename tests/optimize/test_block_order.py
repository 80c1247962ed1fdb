"""The order in which a block's layers are rounded, and which layer makes the block's output."""

import inspect

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import nn

from stepquant.calibration.fake_quant.layers import wrap
from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.samples import CalibrationSet
from stepquant.distributed import Ranks
from stepquant.layers.clock import StepClock
from stepquant.layers.quantized import can_quantize
from stepquant.optimize.block import Block
from stepquant.optimize.blocks import _compared_layers
from stepquant.optimize.reconstruction import Reconstruction
from stepquant.optimize.replay import SampleValues

RESNET = ["conv1", "time_emb_proj", "conv2", "conv_shortcut"]
TRANSFORMER = [
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
    "ff.net.0.proj", "ff.net.2",
]  # fmt: skip
FLUX = ["norm.linear", "proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v", "proj_out"]


def resnet():
    block = ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=12, groups=4)
    return block, (torch.randn(2, 8, 6, 6), torch.randn(2, 12))


def transformer():
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=12)
    return block, (torch.randn(2, 5, 16), None, torch.randn(2, 3, 12))


def flux():
    block = FluxSingleTransformerBlock(16, 2, 8)
    arguments = [
        torch.randn(2, 4, 16),
        torch.randn(2, 3, 16),
        torch.randn(2, 16),
        (torch.ones(7, 8), torch.zeros(7, 8)),
    ]
    if "encoder_hidden_states" not in inspect.signature(block.forward).parameters:
        arguments.pop(1)
    return block, tuple(arguments)


def block_of(module, arguments):
    """The only block of a denoiser, its layers under calibration."""
    whole, copy = nn.ModuleDict({"block": module.eval()}), nn.ModuleDict()
    names = [name for name, part in module.named_modules() if can_quantize(part)]
    layers = {f"block.{name}": wrap(module.get_submodule(name), 4, None, StepClock()) for name in names}
    inputs = SampleValues.of((arguments, {}), 2)
    samples = CalibrationSet.of({"timestep": torch.zeros(2)}, torch.zeros(2, dtype=torch.long))
    return Block("block", whole, CalibrationModel(copy, StepClock(), layers, {}), inputs, inputs, samples, 2, Ranks())


@pytest.mark.parametrize(
    ("make", "order", "final"),
    [(resnet, RESNET, "conv2"), (transformer, TRANSFORMER, "ff.net.2"), (flux, FLUX, "proj_out")],
)
def test_layers_are_in_execution_order_and_the_final_one_makes_the_output(make, order, final):
    block = block_of(*make())
    assert [name.removeprefix("block.") for name in block.layers] == order
    assert block.final_layer == f"block.{final}"
    compared = _compared_layers(block, Reconstruction(layer_weight=0.8))
    assert compared == [f"block.{name}" for name in order if name != final]
    assert _compared_layers(block, Reconstruction(layer_weight=0.8, block_weight=0.0)) == list(block.layers)
    assert _compared_layers(block, Reconstruction()) == []


@pytest.mark.parametrize(
    ("make", "order"), [(resnet, RESNET), (transformer, TRANSFORMER), (flux, FLUX)], ids=["resnet", "dit", "flux"]
)
def test_the_published_layer_loss_leaves_out_the_layer_executed_last(make, order):
    """EDA-DM: all layers but the last one, which in a residual block of diffusers is the shortcut."""
    compared = _compared_layers(block_of(*make()), Reconstruction(layer_weight=0.8, left_out="last"))
    assert compared == [f"block.{name}" for name in order[:-1]]


def test_the_final_layer_of_a_block_of_one_layer():
    layer = nn.Linear(4, 4)
    whole = nn.ModuleDict({"block": layer})
    inputs = SampleValues.of(((torch.randn(2, 4),), {}), 2)
    samples = CalibrationSet.of({"timestep": torch.zeros(2)}, torch.zeros(2, dtype=torch.long))
    model = CalibrationModel(nn.ModuleDict(), StepClock(), {"block": wrap(layer, 4, None, StepClock())}, {})
    block = Block("block", whole, model, inputs, inputs, samples, 2, Ranks())
    assert list(block.layers) == ["block"] and block.final_layer == "block"
