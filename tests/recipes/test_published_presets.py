"""The preset paper of every recipe: through the public API, and its budget."""

import dataclasses

import pytest
import torch

import stepquant
from stepquant.layers.quantized import quantized_modules
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.progress import Progress
from stepquant.recipes import EFFORTS, QAT, RECIPES, Context, find_recipe, published_calibration
from stepquant.recipes.eda_dm import EDADM
from stepquant.recipes.stages import CollectSamples, ReconstructBlocks

SMALL = stepquant.Calibration(samples=8, steps=4)
PAPERS = [name for name, recipe in RECIPES.items() if "paper" in recipe.PRESETS]
FEW = {"iterations": 2, "time_iterations": 2, "rounding_iterations": 2, "scale_iterations": 2}


class Notes(Progress):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


def quantize(pipeline, name, bits="w4a4", **options):
    few = {key: value for key, value in FEW.items() if key in RECIPES[name].fields()}
    few |= options.pop("hyperparameters", {})
    return stepquant.quantize(
        pipeline, bits, recipe=name, preset="paper", calibration=SMALL, hyperparameters=few, **options
    )


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize("kind", ["unconditional_pipeline", "class_pipeline", "text_pipeline"])
def test_every_published_recipe_works_on_every_kind_of_pipeline(name, kind, request, tmp_path):
    if name == "quest" and kind == "class_pipeline":
        pytest.skip("covered by the others; the slowest")
    pipeline = request.getfixturevalue(kind)
    quantized = quantize(pipeline, name)
    stepquant.save(quantized, tmp_path / "out")
    loaded = stepquant.load(tmp_path / "out")
    images = [generate(candidate, make_request(pipeline, 3), range(2), 3) for candidate in (quantized, loaded)]
    assert torch.isfinite(images[0]).all() and torch.equal(*images)


@pytest.mark.parametrize("weights", ["per-tensor", "per-channel"])
@pytest.mark.parametrize("zero_points", ["fixed", "generated"])
def test_published_training(weights, zero_points, unconditional_pipeline):
    quantized = stepquant.train(
        unconditional_pipeline, "w3a3", distill=True, preset="paper", calibration=SMALL,
        hyperparameters={"iterations": 2, "batch_size": 4, "weights": weights, "zero_points": zero_points},
    )  # fmt: skip
    modules = quantized_modules(quantized.unet)
    layers = [module.layer() for module in modules.values()]
    assert all(len(layer.weight.grid.scale.unique()) == 1 for layer in layers) == (weights == "per-tensor")
    assert all(bool((layer.weight.grid.zero_point == 2 ** (layer.weight.bits - 1)).all()) for layer in layers)
    query = modules["mid_block.attentions.0.to_q"].layer().input
    if zero_points == "fixed":
        assert bool((query.zero_point == 4).all()), "signed, not behind SiLU"
    else:
        assert query.zero_point.unique().numel() > 1


@pytest.mark.parametrize("name", ["pqd", "q-diffusion", "eda-dm", "tfmq", "quest"])
def test_8_bit_weights_are_reconstructed_and_the_cut_is_reported(name, unconditional_pipeline):
    progress = Notes()
    count = {"rounding_iterations" if name == "quest" else "iterations": 30}
    rate = {"rounding_rate": 0.5}
    rounded = quantize(unconditional_pipeline, name, "w8a8", progress=progress, hyperparameters=count | rate)
    nearest = quantize(unconditional_pipeline, "ptq4dm", "w8a8")
    pairs = [quantized_modules(pipeline.unet) for pipeline in (rounded, nearest)]
    layer = "down_blocks.0.resnets.0.conv1"
    codes = [modules[layer].layer().weight.codes.int() for modules in pairs]
    assert 0 < float((codes[0] - codes[1]).abs().max()) <= 1, "up or down"
    assert any(note.startswith("deciding the soft roundings") for note in progress.notes)


def test_published_tdq_keeps_weights_and_has_signed_grids(unconditional_pipeline):
    quantized = quantize(unconditional_pipeline, "tdq")
    nearest = stepquant.quantize(unconditional_pipeline, "w4a4", recipe="ptq4dm", calibration=SMALL)
    grids = {}
    for name, module in quantized_modules(quantized.unet).items():
        assert torch.equal(module.layer().weight.codes, quantized_modules(nearest.unet)[name].layer().weight.codes)
        grids[name] = module.layer().input
    assert bool((grids["mid_block.attentions.0.to_q"].zero_point == 8).all())
    behind_silu = grids["mid_block.resnets.0.conv1"]
    expected = torch.round(0.2785 / behind_silu.scale).clamp(max=15)
    assert torch.equal(behind_silu.zero_point.float(), expected)
    assert behind_silu.rows == unconditional_pipeline.scheduler.config.num_train_timesteps


def test_published_tfmq_has_a_range_per_timestep_in_the_time_layers_alone(unconditional_pipeline):
    layers = quantized_modules(quantize(unconditional_pipeline, "tfmq").unet)
    rows = {name: module.layer().input.rows for name, module in layers.items() if module.layer().input is not None}
    assert {count for name, count in rows.items() if "time_emb" in name} == {4}
    assert {count for name, count in rows.items() if "time_emb" not in name} == {1}


def test_quest_trains_no_scale_of_the_time_layers_with_the_critical_ones(unconditional_pipeline):
    def scales(**iterations):
        modules = quantized_modules(quantize(unconditional_pipeline, "quest", hyperparameters=iterations).unet)
        return {name: module.layer().input.scale for name, module in modules.items() if module.layer().input}

    before, after = scales(iterations=0), scales(iterations=3)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("time_emb" in name for name in changed)


def test_the_public_codes_values_depend_on_the_model_and_the_bits(unconditional_pipeline, text_pipeline):
    recipe = EDADM.preset("paper")

    def values(pipeline, bits, recipe=recipe):
        empty = {field.name: None for field in dataclasses.fields(Context)}
        context = Context(**empty | {"pipeline": pipeline, "spec": stepquant.QuantSpec.parse(bits)})
        found = recipe.fitted(context)
        return found.diversity_weight, found.radius, found.layer_weight, found.rounding_rate, found.scale_rate

    assert values(unconditional_pipeline, "w4a8") == (1.2, 3.0, 0.8, 0.5, 5e-4)  # CIFAR-10
    assert values(unconditional_pipeline, "w8a8") == (1.2, 3.0, 0.8, 0.05, 1e-3)
    assert values(text_pipeline, "w4a8") == (5.0, 0.3, 0.8, 0.03, 1e-4)  # Stable Diffusion
    assert values(text_pipeline, "w4a8", recipe.replace(layer_weight=0.0))[2] == 0.0, "what is set stays"


@pytest.mark.parametrize("name", PAPERS)
def test_a_thorough_effort_is_the_published_budget_and_the_others_are_parts_of_it(name):
    published = published_calibration(name, "paper")
    assert published_calibration(name, None) is None and published_calibration(name, "fast") is None
    whole = EFFORTS["thorough"].calibration(published)
    assert whole == {"samples": published.samples, "steps": published.steps, "trajectories": published.trajectories}
    assert find_recipe(name, "paper", effort="thorough") == RECIPES[name].preset("paper")
    quick = EFFORTS["quick"].calibration(published)
    assert quick["samples"] == published.samples / 16 and quick["steps"] == 20
    few = find_recipe(name, "paper", effort="quick")
    for field, value in RECIPES[name].preset("paper"):
        if field.endswith("iterations"):
            assert getattr(few, field) == max(1, round(value / 200))


def test_published_sizes():
    assert published_calibration("quest", "paper").samples == 20 * 256
    recipe = find_recipe("quest", "paper", effort="thorough")
    assert recipe.time_iterations + recipe.iterations == 2200 and recipe.rounding_iterations == 20_000
    assert find_recipe("eda-dm", "paper", effort="thorough").iterations == 5000
    weights, scales = (
        stage for stage in find_recipe("q-diffusion", "paper", effort="thorough").stages()
        if isinstance(stage, ReconstructBlocks)
    )  # fmt: skip
    assert (weights.iterations, weights.scales) == (20_000, None)
    assert (scales.iterations, scales.rounding, scales.power) == (5000, None, 2.4)
    collect = next(stage for stage in RECIPES["pqd"].preset("paper").stages() if isinstance(stage, CollectSamples))
    assert (collect.selection, collect.mean, collect.deviation) == ("normal", 0.4, 0.4)
    assert QAT.preset("paper").weights == "per-tensor"
