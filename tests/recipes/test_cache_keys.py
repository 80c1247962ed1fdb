"""A finished stage is reused only for the same inputs, code and version."""

from test_context import context

import stepquant
from stepquant import version
from stepquant.recipes import QDiffusion, QuEST, State, find_class
from stepquant.recipes.recipe import run_recipe
from stepquant.recipes.stages import AddQuantizers, CollectSamples, ReconstructBlocks
from stepquant.user_code import identity, load_function, source_digest

STAGE = """
import torch
from stepquant.recipes import MinMax, Stage
from stepquant.recipes.stages import CollectSamples

RUNS = []

class Scale(Stage):
    factor: float = 2.0

    def run(self, context, state):
        def compute():
            RUNS.append(self.factor)
            return {"x": torch.tensor(self.factor * WEIGHT)}
        state.result = float(context.cached(self.key(context, state), compute)["x"])

class Custom(MinMax):
    factor: float = 2.0

    def stages(self):
        return [*super().stages(), Scale(factor=self.factor)]
"""


def write(folder, weight):
    path = folder / "custom.py"
    path.write_text(STAGE.replace("WEIGHT", weight))
    return path


def result(path, pipeline, workspace, **values):
    """The result of the custom stage, and the runs of this copy of the module."""
    recipe = find_class(f"{path}:Custom")
    stages = recipe(**values).stages()
    scale, state, given = stages[-1], State(), context(pipeline, workspace)
    for stage in stages:
        stage.run(given, state)
    return state.result, type(scale).run.__globals__["RUNS"]


def test_a_custom_stage_runs_again_when_its_source_or_settings_change(unconditional_pipeline, tmp_path):
    path = write(tmp_path, "1.0")
    assert result(path, unconditional_pipeline, tmp_path / "work") == (2.0, [2.0])
    assert result(path, unconditional_pipeline, tmp_path / "work") == (2.0, []), "results of the same source are reused"
    assert result(path, unconditional_pipeline, tmp_path / "work", factor=3.0) == (3.0, [3.0])
    edited = write(tmp_path, "5.0")
    assert result(edited, unconditional_pipeline, tmp_path / "work") == (10.0, [2.0])
    assert result(write(tmp_path, "1.0"), unconditional_pipeline, tmp_path / "work") == (2.0, [])


def blocks(folder):
    return {path.name for path in folder.glob("block-*")}


def run(pipeline, folder, recipe):
    stepquant.quantize(
        pipeline, "w4a8", recipe=recipe, calibration=stepquant.Calibration(samples=4, steps=2), workspace=folder
    )
    return blocks(folder)


def test_another_version_of_the_package_reuses_nothing(unconditional_pipeline, tmp_path, monkeypatch):
    recipe = QDiffusion(iterations=0)
    first = run(unconditional_pipeline, tmp_path, recipe)
    assert first and run(unconditional_pipeline, tmp_path, recipe) == first, "the same version reuses them"
    samples = {path.name for path in tmp_path.glob("samples-*")}
    monkeypatch.setattr(version, "__version__", "99.0")
    both = run(unconditional_pipeline, tmp_path, recipe)
    assert first < both and len(both) == 2 * len(first)
    assert len({path.name for path in tmp_path.glob("samples-*")}) == 2 * len(samples)


def test_another_version_of_a_stage_reuses_nothing(unconditional_pipeline, tmp_path, monkeypatch):
    recipe = QDiffusion(iterations=0)
    first = run(unconditional_pipeline, tmp_path, recipe)
    monkeypatch.setattr(ReconstructBlocks, "version", 2)
    assert len(run(unconditional_pipeline, tmp_path, recipe)) == 2 * len(first)


RANGE = """
from stepquant.core.affine import affine_from_range

def shrunk(values, bits, low, high):
    return low * FACTOR, high * FACTOR

def made(factor):
    return lambda values, bits, low, high: (low * factor, high * factor)
"""


def test_a_custom_range_search_or_rounding_is_part_of_the_key(unconditional_pipeline, tmp_path):
    path = tmp_path / "ranges.py"

    def key(factor, function="shrunk"):
        path.write_text(RANGE.replace("FACTOR", factor))
        search = load_function(f"{path}:{function}", "range")
        stages = [CollectSamples(), AddQuantizers(weight_range=search if function == "shrunk" else search(0.5))]
        state, given = State(), context(unconditional_pipeline, tmp_path / "work")
        for stage in stages:
            stage.run(given, state)
            state.history.append(stage.identity())
        return ReconstructBlocks().key(given, state)

    assert key("0.9") == key("0.9") != key("0.8")
    assert key("0.9", "made") == key("0.9", "made")


def test_what_a_function_closes_over_is_part_of_its_identity():
    def made(factor):
        def search(values, bits, low, high):
            return low * factor, high * factor

        return search

    assert identity(made(0.5)) == identity(made(0.5)) != identity(made(0.6))
    assert source_digest(QuEST) == source_digest(QDiffusion), "the package version identifies its own classes"


def test_earlier_stages_are_reused_by_a_recipe_that_differs_in_the_last(unconditional_pipeline, tmp_path):
    few = {"rounding_iterations": 0, "time_iterations": 0, "critical": "attention"}
    first = run(unconditional_pipeline, tmp_path, QuEST(**few, iterations=1))
    assert first and run(unconditional_pipeline, tmp_path, QuEST(**few, iterations=2)) == first
    given = context(unconditional_pipeline, tmp_path / "other")
    assert run_recipe(QuEST(**few, iterations=0), given).layers
