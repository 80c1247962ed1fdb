import functools
import json
from typing import ClassVar

import pytest
import torch

import stepquant
from stepquant.calibration.sensitivity import Sensitivity
from stepquant.config import LayerBits
from stepquant.errors import StepquantError
from stepquant.layers.quantized import quantized_modules
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.progress import Progress
from stepquant.provenance import plain
from stepquant.recipes import QAT, RECIPES, TDQ, MinMax, QDiffusion, find_recipe
from stepquant.recipes.stages.finetuning import most_critical

SMALL = stepquant.Calibration(samples=4, steps=2)


def test_every_recipe_has_a_summary_and_defaults():
    for name, recipe in RECIPES.items():
        assert recipe.summary().endswith(".")
        assert find_recipe(name) == recipe() == find_recipe(recipe) == find_recipe(recipe())
        assert all(field.description for field in recipe.fields().values())


def test_unknown_recipes_and_hyperparameters_are_rejected():
    with pytest.raises(StepquantError, match="expected one of auto, minmax"):
        find_recipe("magic")
    with pytest.raises(StepquantError, match=r"^recipe minmax has no hyperparameter 'iterations': it has none\.$"):
        MinMax(iterations=3)


@pytest.mark.parametrize(
    ("recipe", "key", "value", "expected"),
    [
        ("q-diffusion", "iterations", -1, "a whole number, 0 or more"),
        ("q-diffusion", "iterations", 2.5, "a whole number, 0 or more"),
        ("q-diffusion", "iterations", True, "a whole number, 0 or more"),
        ("tfmq", "time_iterations", "3", "a whole number, 0 or more"),
        ("quest", "batch_size", 0, "a whole number, 1 or more"),
        ("tdq", "scale_rate", float("nan"), "a finite number, 0 or more"),
        ("pqd", "drop_probability", float("inf"), "a number from 0 to 1 or None"),
        ("ptq4dm", "mean", -0.1, "a finite number, 0 or more"),
    ],
)
def test_invalid_hyperparameters_are_rejected(recipe, key, value, expected):
    with pytest.raises(StepquantError, match=f"^{key} of recipe {recipe} is {value!r}: expected {expected}.$"):
        find_recipe(recipe, overrides={key: value})
    assert getattr(find_recipe(recipe, overrides={key: 1}), key) == 1


def test_training_rejects_invalid_hyperparameters(unconditional_pipeline):
    for key, value in (("batch_size", 0), ("iterations", 2.5), ("weight_rate", float("nan"))):
        with pytest.raises(StepquantError, match=f"^{key} of recipe qat is {value!r}: expected"):
            QAT(**{key: value})
        with pytest.raises(StepquantError, match=f"^{key} of recipe qat is {value!r}: expected"):
            stepquant.train(unconditional_pipeline, "w4a8", distill=True, hyperparameters={key: value})


def test_the_spec_applies_to_the_layers(unconditional_pipeline):
    spec = {"bits": "w4a8", "overrides": {r"mid_block\.resnets": "w8a8", "time_embedding": "w16a16"}, "group_size": 8}
    quantized = stepquant.quantize(unconditional_pipeline, spec, recipe="minmax", calibration=SMALL)
    layers = {name: module.format for name, module in quantized_modules(quantized.unet).items()}
    assert layers["mid_block.resnets.0.conv1"].weight.bits == 8
    assert layers["down_blocks.0.resnets.0.conv1"].weight.bits == 4
    assert layers["down_blocks.1.resnets.0.conv2"].weight.groups == (8, 8)
    assert (layers["conv_in"].weight.bits, layers["conv_in"].input) == (8, None)
    assert (layers["conv_out"].weight.bits, layers["conv_out"].input.bits) == (8, 8)
    assert not any(name.startswith("time_embedding") for name in layers)


def test_q_diffusion_splits_skips_unless_the_spec_disables_it(unconditional_pipeline):
    for given, groups in ((None, 2), (False, 1)):
        spec = {"bits": "w4a8", "split_skips": given}
        quantized = stepquant.quantize(unconditional_pipeline, spec, recipe=QDiffusion(iterations=0), calibration=SMALL)
        layer = quantized_modules(quantized.unet)["up_blocks.0.resnets.0.conv1"].format
        assert max(1, len(layer.weight.groups)) == groups


def test_weight_only_keeps_activations_in_floating_point(text_pipeline):
    quantized = stepquant.quantize(text_pipeline, "w4a16", recipe="minmax", calibration=SMALL)
    assert all(module.format.input is None for module in quantized_modules(quantized.unet).values())


def test_invalid_input_is_rejected_before_sampling(unconditional_pipeline, monkeypatch):
    calls = []
    monkeypatch.setattr("stepquant.recipes.stages.samples.collect", lambda *arguments, **_: calls.append(arguments))
    with pytest.raises(StepquantError, match="nothing to quantize"):
        stepquant.quantize(unconditional_pipeline, "w16a16")
    with pytest.raises(StepquantError, match="matches none"):
        stepquant.quantize(
            unconditional_pipeline, {"bits": "w4a8", "overrides": {"no_such": "w8a8"}}, calibration=SMALL
        )
    assert not calls, "no sample is collected"
    with pytest.raises(StepquantError, match="Leave out `prompts`"):
        stepquant.quantize(unconditional_pipeline, "w4a8", prompts=["a cat"])
    monkeypatch.undo()
    quantized = stepquant.quantize(unconditional_pipeline, "w4a8", recipe="minmax", calibration=SMALL)
    with pytest.raises(StepquantError, match="quantized already"):
        stepquant.quantize(quantized, "w4a8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"calibration": {"steps": 0}}, r"^calibration: steps: Input should be greater than 0 \(given: 0\)\.$"),
        ({"calibration": {"sampels": 4}}, r"^calibration: sampels: Extra inputs"),
        ({"calibration": 4}, r"^calibration: Input should be .* \(given: 4\)\.$"),
        ({"budget": "few"}, "budget 'few' is not understood"),
        ({"budget": "1bits"}, "a budget of 1 bits cannot be met"),
        ({"seed": -1}, "^seed is -1: expected a whole number, 0 or more.$"),
        ({"seed": 0.5}, "^seed is 0.5: expected a whole number, 0 or more.$"),
    ],
)
def test_invalid_arguments_are_rejected(arguments, message, unconditional_pipeline):
    for call in (stepquant.quantize, functools.partial(stepquant.train, distill=True)):
        with pytest.raises(StepquantError, match=message):
            call(unconditional_pipeline, "w4a8", **arguments)


def test_sensitivity_rejects_invalid_arguments(unconditional_pipeline):
    for name, value in (("samples", 0), ("steps", 0), ("seed", -1)):
        given = {name: value} if name == "seed" else {"calibration": {name: value}}
        with pytest.raises(StepquantError, match=rf"\b{name}\b.* {value}\b"):
            stepquant.sensitivity(unconditional_pipeline, "w4a8", **given)


@pytest.mark.usefixtures("small_ranking")
def test_calibration_and_budget_as_text(unconditional_pipeline):
    written = stepquant.quantize(
        unconditional_pipeline, "w4a8", recipe="minmax", calibration={"samples": 4, "steps": 2}, budget="6bits"
    )
    typed = stepquant.quantize(
        unconditional_pipeline,
        "w4a8",
        recipe="minmax",
        calibration=stepquant.Calibration(samples=4, steps=2),
        budget=6.0,
    )
    assert written.unet.config["quantization_config"] == typed.unet.config["quantization_config"]


QUICK = {"iterations": 2, "time_iterations": 2, "rounding_iterations": 2}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", ["unconditional_pipeline", "class_pipeline", "text_pipeline"])
def test_every_recipe_works_on_every_kind_of_pipeline(name, kind, request, tmp_path):
    pipeline = request.getfixturevalue(kind)
    arguments = {key: value for key, value in QUICK.items() if key in RECIPES[name].fields()}
    if name == "quest" and kind == "unconditional_pipeline":
        arguments["critical"] = "attention"
    quantized = stepquant.quantize(pipeline, "w4a4", recipe=name, calibration=SMALL, hyperparameters=arguments)
    stepquant.save(quantized, tmp_path / "out")
    loaded = stepquant.load(tmp_path / "out")
    request_ = make_request(pipeline, 3)  # not the calibrated steps
    images = [generate(candidate, request_, range(2), 3) for candidate in (quantized, loaded)]
    assert torch.isfinite(images[0]).all() and torch.equal(*images)


def test_tdq_stores_a_row_for_every_training_timestep(unconditional_pipeline):
    def rows(**arguments):
        quantized = stepquant.quantize(
            unconditional_pipeline, "w4a8", recipe=TDQ(iterations=2, **arguments), calibration=SMALL
        )
        layers = [module.layer() for module in quantized_modules(quantized.unet).values()]
        return {layer.input.rows for layer in layers if layer.input is not None}

    assert rows() == {unconditional_pipeline.scheduler.config.num_train_timesteps}
    assert rows(intervals="static") == {1}


def test_an_unknown_choice_is_rejected():
    with pytest.raises(StepquantError, match="expected one of generator, table, static"):
        TDQ(intervals="magic")


def test_exact_time_leaves_the_time_layers_unquantized(unconditional_pipeline):
    quantized = stepquant.quantize(
        unconditional_pipeline, {"bits": "w4a8", "exact_time": True}, recipe="minmax", calibration=SMALL
    )
    names = set(quantized_modules(quantized.unet))
    assert names and not any("time_emb" in name for name in names)
    time = torch.tensor([400])
    embedding = unconditional_pipeline.unet.time_proj(time)
    expected = unconditional_pipeline.unet.time_embedding(embedding)
    assert torch.equal(quantized.unet.time_embedding(embedding), expected)


def test_a_custom_class_is_a_recipe(unconditional_pipeline, tmp_path):
    class Mine(MinMax):
        """A custom recipe."""

        name: ClassVar = "mine"
        strength: float = 1.0

        def stages(self):
            assert self.strength == 2.0
            return super().stages()

    quantized = stepquant.quantize(unconditional_pipeline, "w8a8", recipe=Mine(strength=2.0), calibration=SMALL)
    stepquant.save(quantized, tmp_path / "out")
    assert '"mine"' in (tmp_path / "out" / "stepquant.json").read_text()
    with pytest.raises(StepquantError, match="recipe mine has no hyperparameter 'power'"):
        stepquant.quantize(unconditional_pipeline, "w8a8", recipe=Mine, calibration=SMALL, hyperparameters={"power": 1})


@pytest.mark.parametrize("name", RECIPES)
def test_serialized_hyperparameters_restore_the_recipe(name):
    """As studies and checkpoints store them, defaults included."""
    recipe = find_recipe(name)
    assert find_recipe(name, overrides=json.loads(json.dumps(plain(recipe)))) == recipe


def test_quest_ranks_and_reports_its_critical_layers(unconditional_pipeline):
    class NoteRecorder(Progress):
        def __init__(self):
            self.notes = []

        def note(self, message):
            self.notes.append(message)

    progress = NoteRecorder()
    stepquant.quantize(
        unconditional_pipeline,
        "w4a4",
        recipe="quest",
        calibration=stepquant.Calibration(samples=4, steps=2),
        progress=progress,
        hyperparameters={
            "critical": "ranked",
            "critical_share": 0.5,
            "rounding_iterations": 0,
            "time_iterations": 0,
            "iterations": 1,
        },
    )
    (note,) = (note for note in progress.notes if note.startswith("critical layers"))
    assert "conv" in note and "time_emb" not in note


def test_critical_layers_reduce_the_error_most_within_their_share():
    bits = dict.fromkeys("abcde", LayerBits(4, 4))
    sizes = dict(zip("abcde", (10, 60, 10, 10, 10), strict=True))
    reduction = torch.tensor([[0.1], [0.9], [0.3], [0.2], [-0.1]], dtype=torch.float64)
    ranking = Sensitivity("leave-one-out", bits, sizes, ((0, 0),), reduction, torch.ones(1))
    assert most_critical(ranking, 0.2, ()) == ("c", "d"), "b does not fit"
    assert most_critical(ranking, 0.2, ("c",)) == ("d", "a")
    assert most_critical(ranking, 1.0, ()) == ("b", "c", "d", "a"), "e does not reduce the error"
