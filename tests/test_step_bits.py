"""Activation bits that depend on the denoising step, through the public interface."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import stepquant as sq
from stepquant.checkpoint.format import WEIGHTS
from stepquant.errors import StepquantError
from stepquant.export.onnx import export_onnx
from stepquant.layers.interception import quantized_attentions
from stepquant.layers.quantized import quantized_modules
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.recipes import RECIPES
from stepquant.runtime.native import supported
from stepquant.runtime.native.replay import step_by_step
from tests.checkpoint.test_damage import reseal

SMALL = sq.Calibration(samples=8, steps=4)
LAYER = "transformer_blocks.0.ff.net.2"


def images(pipeline, steps=4):
    return generate(pipeline, make_request(pipeline, steps), range(2), 0)


def quantized(pipeline, bits="w4a4", step_bits=None, recipe="minmax", **options):
    step_bits = {"0.5-1": 8} if step_bits is None else step_bits
    spec = sq.QuantSpec(bits=bits, step_bits=step_bits, **options)
    return sq.quantize(pipeline, spec, recipe=recipe, calibration=SMALL)


def bits_of(pipeline, layer=LAYER) -> list[int]:
    """Activation bits of a layer, first step first."""
    grid = quantized_modules(pipeline.transformer)[layer].layer().input
    return [grid.bits] if grid.row_bits is None else grid.row_bits.flip(0).tolist()


@pytest.fixture(scope="module", params=["static", "dynamic"])
def model(request, class_pipeline):
    return quantized(class_pipeline, activations=request.param)


def test_rows_have_the_bits_of_their_interval(model):
    assert bits_of(model) == [4, 4, 8, 8]
    for operand, found in (("query", [8, 8, 4, 4]), ("value", [8, 8, 4, 4]), ("probability", None)):
        grid = next(iter(quantized_attentions(model.transformer).values())).grid(operand)
        assert (None if grid.row_bits is None else grid.row_bits.tolist()) == found


def test_saves_loads_and_generates_what_was_quantized(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    loaded = sq.load(tmp_path / "model")
    assert bits_of(loaded) == [4, 4, 8, 8]
    assert torch.equal(images(loaded), images(model))
    assert torch.equal(images(loaded, 7), images(model, 7))


def test_more_bits_at_the_end_are_closer_to_full_precision(model, class_pipeline):
    exact, activations = images(class_pipeline), quantized_modules(model.transformer)[LAYER].layer().input
    kind = "static" if hasattr(activations, "scale") else "dynamic"
    errors = [
        float((images(other) - exact).square().mean())
        for other in (quantized(class_pipeline, "w4a8", {}, activations=kind), model)
    ]
    assert (
        errors[0] < errors[1] < float((images(quantized(class_pipeline, step_bits={"0-1": 2})) - exact).square().mean())
    )


@pytest.mark.skipif(supported() is not None, reason=str(supported()))
def test_recordings_change_the_bits_with_the_step(unconditional_pipeline):
    model = quantized(unconditional_pipeline)
    images(model)
    found = images(model)
    with step_by_step():
        assert torch.equal(images(model), found)


def test_more_steps_take_the_bits_of_the_nearest(model):
    """Of 8 steps the last half has 8 bits, too."""
    model.scheduler.set_timesteps(8)
    clock, seen = quantized_modules(model.transformer)[LAYER].clock, []
    for time in model.scheduler.timesteps:
        clock.set(time)
        seen.append(int(quantized_modules(model.transformer)[LAYER].layer().input.bits_at(clock.row)))
    assert sorted(seen) == seen and seen.count(8) in (3, 4)


def test_overrides_and_edges_keep_their_bits(class_pipeline):
    found = quantized(class_pipeline, step_bits={"0-0.5": 2, "0.5-1:net.2": 8}, overrides={r"0\.ff\.net\.2": "w4a5"})
    assert bits_of(found) == [5]
    assert bits_of(found, "transformer_blocks.1.ff.net.2") == [2, 2, 8, 8]
    assert bits_of(found, "transformer_blocks.1.ff.net.0.proj") == [2, 2, 4, 4]
    assert bits_of(found, "proj_out_2") == [8]


def test_last_layer_keeps_first_last_bits(class_pipeline):
    found = quantized(class_pipeline, "w8a8", {"0-0.5": 4})
    assert bits_of(found) == [4, 4, 8, 8] and bits_of(found, "proj_out_2") == [8]


def few(recipe) -> dict[str, int]:
    return {name: 1 for name in RECIPES[recipe].model_fields if name.endswith("iterations")}


@pytest.mark.parametrize("name", ["q-diffusion", "tdq", "tfmq", "eda-dm", "quest"])
def test_every_recipe(name, class_pipeline):
    found = quantized(class_pipeline, recipe=RECIPES[name](**few(name)))
    assert set(bits_of(found)) == {4, 8}
    assert torch.isfinite(images(found)).all()


@pytest.mark.parametrize("recipe", ["tdq", "quest"])
def test_published_variants(recipe, class_pipeline):
    """One learned interval for a timestep, in steps of the bits that it has there."""
    found = sq.quantize(
        class_pipeline,
        sq.QuantSpec(bits="w4a4", step_bits={"0.5-1": 8}),
        recipe=recipe,
        preset="paper",
        hyperparameters=few(recipe),
        calibration=SMALL,
    )
    grid = quantized_modules(found.transformer)[LAYER].layer().input
    width, (change,) = grid.scale[:, 0, 0] * grid.tops, grid.row_bits.int().diff().nonzero().flatten()
    assert 0.5 < width[change] / width[change + 1] < 2


@pytest.mark.parametrize("values", [[1, 8, 8, 8], [9, 8, 4, 4]])
def test_damaged_bits_are_refused(values, model, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tensors = load_file(folder / "transformer" / WEIGHTS)
    tensors[f"{LAYER}.input_bits"] = torch.tensor(values, dtype=torch.uint8)
    save_file(tensors, folder / "transformer" / WEIGHTS, metadata={"format": "pt"})
    reseal(folder)
    with pytest.raises(StepquantError, match=r"bits of a row are .*damaged"):
        sq.load(folder)
    shutil.rmtree(folder)


def test_export_is_refused_in_one_sentence(class_pipeline, tmp_path):
    with pytest.raises(StepquantError, match="without step_bits"):
        export_onnx(quantized(class_pipeline).transformer, {}, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "step_bits, message",
    [
        ({"0.8": 8}, "expected an interval between 0"),
        ({"0.8-0.2": 8}, "expected an interval"),
        ({"0.5-1.5": 8}, "expected an interval"),
        ({"0.5-1": 9}, "less than or equal to 8"),
        ({"0.5-1:[": 8}, "not a regular expression"),
    ],
)
def test_step_bits_that_are_not_understood(step_bits, message):
    with pytest.raises(StepquantError, match=message):
        sq.QuantSpec(bits="w4a4", step_bits=step_bits)


def test_layers_that_do_not_exist(class_pipeline):
    with pytest.raises(StepquantError, match="step bits for 'nowhere' matches none"):
        quantized(class_pipeline, step_bits={"0-1:nowhere": 8})


def test_activations_in_floating_point_have_no_bits(class_pipeline):
    with pytest.raises(StepquantError, match="leave activations in floating point"):
        quantized(class_pipeline, "w4a16")
