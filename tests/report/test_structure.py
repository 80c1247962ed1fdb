from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

import stepquant
from stepquant.report.structure import activation_ranges, bytes_by_content, layer_rows, timesteps_of, weights_by_bits


@pytest.fixture(scope="module")
def denoiser(quantized_folder):
    return stepquant.load(quantized_folder).unet


@pytest.fixture(scope="module")
def stored(quantized_folder):
    return load_file(quantized_folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_ranges_are_scale_times_levels(denoiser, stored):
    ranges = {activation.name: activation for activation in activation_ranges(denoiser)}
    name = "down_blocks.0.resnets.0.conv1"
    torch.testing.assert_close(ranges[name].width, stored[f"{name}.input_scale"][:, 0, 0] * 255)
    operand = "down_blocks.1.attentions.0.processor.key_scale"
    torch.testing.assert_close(ranges["down_blocks.1.attentions.0 key"].scale, stored[operand][:, 0, 0])
    assert len(ranges[name].scale) == len(timesteps_of(denoiser)) == 3
    assert len(ranges) == sum(table.shape[1] for key, table in stored.items() if _is_activation_scale(key))


def _is_activation_scale(key: str) -> bool:
    return key.endswith("input_scale") or (".processor." in key and key.endswith("_scale"))


def test_a_split_skip_has_a_range_for_each_side(denoiser, stored):
    name = "up_blocks.0.resnets.0.conv1"
    sides = [activation for activation in activation_ranges(denoiser) if activation.name.startswith(f"{name} ")]
    assert [side.name for side in sides] == [f"{name} [0:16]", f"{name} [16:32]"]
    for column, side in enumerate(sides):
        torch.testing.assert_close(side.scale, stored[f"{name}.input_scale"][:, column, 0])


def test_rows_say_what_each_layer_became(denoiser, stored):
    rows = {row.name: row for row in layer_rows(denoiser)}
    layer = rows["down_blocks.0.resnets.0.conv1"]
    assert (layer.kind, layer.shape, layer.weight_bits, layer.activation_bits, layer.rows) == (
        "convolution",
        (8, 8, 3, 3),
        4,
        "8",
        3,
    )
    width = stored[f"{layer.name}.input_scale"] * 255
    assert layer.ranges == (pytest.approx(width.min().item()), pytest.approx(width.max().item()))
    kept = rows["mid_block.resnets.0.conv1"]
    assert (kept.weight_bits, kept.activation_bits, kept.rows, kept.ranges) == (None, None, None, None)
    attention = rows["down_blocks.1.attentions.0"]
    assert (attention.kind, attention.shape, attention.activation_bits) == ("attention", (), "8")
    assert rows["conv_in"].activation_bits is None


def test_bytes_are_those_of_the_file(denoiser, stored):
    contents = bytes_by_content(denoiser)
    assert sum(contents.values()) == sum(tensor.nbytes for tensor in stored.values())
    assert contents["weights in integers"] == sum(stored[key].nbytes for key in stored if key.endswith("weight_packed"))
    row = next(row for row in layer_rows(denoiser) if row.name == "conv_out")
    assert row.stored_bytes == sum(tensor.nbytes for key, tensor in stored.items() if key.startswith("conv_out."))


def test_every_weight_is_counted_once(denoiser, unconditional_pipeline):
    counts = weights_by_bits(layer_rows(denoiser))
    assert list(counts) == [4, 8, None]
    modules = unconditional_pipeline.unet.modules()
    assert sum(counts.values()) == sum(
        math.prod(module.weight.shape) for module in modules if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    )
