"""Dynamic activations through the public interface."""

from __future__ import annotations

import pytest
import torch

import stepquant as sq
from stepquant.core.dynamic import DynamicGrid
from stepquant.errors import StepquantError
from stepquant.export.onnx import export_onnx
from stepquant.layers.quantized import quantized_modules
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.recipes import RECIPES

SMALL = sq.Calibration(samples=4, steps=2)


def images(pipeline):
    return generate(pipeline, make_request(pipeline, 2), range(2), 0)


def dynamic(pipeline, bits="w8a8", **options):
    recipe = options.pop("recipe", "minmax")
    spec = sq.QuantSpec(bits=bits, activations="dynamic", **options)
    return sq.quantize(pipeline, spec, recipe=recipe, calibration=SMALL)


@pytest.mark.parametrize("name", ["unconditional_pipeline", "class_pipeline", "text_pipeline"])
def test_saves_loads_and_generates_what_was_quantized(name, request, tmp_path):
    pipeline = request.getfixturevalue(name)
    quantized = dynamic(pipeline, group_size=8)
    produced = images(quantized)
    assert 0 < (produced - images(pipeline)).abs().max() < 0.5
    quantized.save_pretrained(tmp_path / "model")
    assert torch.equal(images(sq.load(tmp_path / "model")), produced)


def test_layers_compute_the_definition(class_pipeline):
    """Each token rounded to the range of its own channels, times the dequantized weight, in float64."""
    quantized = dynamic(class_pipeline)
    module = quantized_modules(quantized.transformer)["transformer_blocks.0.ff.net.2"]
    x = torch.randn(2, 5, module.in_features)
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero_point = torch.round(-low / scale)
    codes = (torch.round(x * (1 / scale)) + zero_point).clamp(0, 255)
    weight = module.layer().weight.dequantize().double()
    expected = ((codes - zero_point) * scale).double() @ weight.t() + module.bias
    assert torch.allclose(module(x).double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("recipe", ["q-diffusion", "quest", "tdq"])
@pytest.mark.parametrize("bits", ["w4a8", "w8a8"])
def test_recipes_that_learn_have_nothing_to_learn_of_activations(recipe, bits, class_pipeline):
    few = {"q-diffusion": {"iterations": 2}, "tdq": {"iterations": 2}}
    few["quest"] = {"iterations": 2, "time_iterations": 2, "rounding_iterations": 2}
    quantized = dynamic(class_pipeline, bits, recipe=RECIPES[recipe](**few[recipe]))
    layers = quantized_modules(quantized.transformer).values()
    assert all(isinstance(module.layer().input, DynamicGrid | None) for module in layers)
    assert torch.isfinite(images(quantized)).all()


def test_exporters_name_what_they_need(unconditional_pipeline, tmp_path):
    unet = dynamic(unconditional_pipeline).unet
    arguments = {"sample": torch.randn(2, 1, 16, 16), "timestep": torch.tensor(500.0)}
    with pytest.raises(StepquantError, match="needs activation scales that are stored"):
        export_onnx(unet, arguments, tmp_path / "model.onnx")
