from __future__ import annotations

from pathlib import Path

import pytest

import stepquant
from stepquant.pipelines.request import make_request
from stepquant.planning import make_plan
from stepquant.recipes import EFFORTS, QAT, RECIPES, Context, MinMax, QDiffusion, QuEST
from stepquant.workspace import Workspace
from tests.described import described


def plan_of(pipeline, samples, steps, recipe):
    calibration = stepquant.Calibration(samples=samples, steps=steps)
    request, spec = make_request(pipeline, steps), stepquant.QuantSpec.parse("w4a8")
    context = Context(pipeline, "unet", spec, calibration, request, 0, Workspace(Path("unused")))
    return make_plan(context, recipe)


def test_a_plan_counts_passes_and_iterations(unconditional_pipeline):
    unet = unconditional_pipeline.unet
    calls = []
    handle = unet.register_forward_pre_hook(lambda *_: calls.append(1))
    plan = plan_of(unconditional_pipeline, 128, 20, QDiffusion(iterations=50, batch_size=8))
    handle.remove()
    assert len(calls) == 2 + 3, "two steps of one image are measured, after the description has been traced"
    assert plan.parameters == sum(parameter.numel() for parameter in unet.parameters())
    (collect, collecting), (blocks, learning) = plan.stages
    assert collect.passes == 64 * 20 and blocks.passes == 4 * 128 + 3 * 50 * 8
    assert collecting > 0 and learning / collecting == pytest.approx(blocks.passes / collect.passes)
    assert plan.memory > 4 * plan.parameters
    count = len(described(unet).blocks)
    assert f"{count} blocks, 50 iterations each" in str(plan) and "128 samples from 64 images of 20 steps" in str(plan)
    assert "iterations" not in str(plan_of(unconditional_pipeline, 4, 2, MinMax()))


def test_a_plan_counts_every_stage_of_a_recipe(unconditional_pipeline, monkeypatch):
    monkeypatch.setattr("stepquant.planning.peak_resident_bytes", lambda: 0)  # that of earlier tests
    recipe = QuEST(rounding_iterations=7, time_iterations=8, iterations=9)
    plan = str(plan_of(unconditional_pipeline, 4, 2, recipe))
    for part in ("smooth", "7 iterations each", "calibrate ranges", "rank", "8 iterations", "9 iterations"):
        assert part in plan
    trained = plan_of(unconditional_pipeline, 4, 2, QAT(iterations=11, batch_size=64))
    assert "11 iterations" in str(trained)
    assert trained.memory > plan_of(unconditional_pipeline, 4, 2, MinMax()).memory


def test_efforts_increase():
    quick, standard, thorough = EFFORTS["quick"], EFFORTS["standard"], EFFORTS["thorough"]
    assert all(less < more for less, more in zip(quick, standard, strict=True))
    assert all(less < more for less, more in zip(standard, thorough, strict=True))
    defaults = stepquant.Calibration()
    assert (standard.samples, standard.steps) == (defaults.samples, defaults.steps)


@pytest.mark.parametrize("recipe", [*RECIPES.values(), QAT])
def test_an_effort_scales_every_iteration_count(recipe):
    counts = {name: value for name, value in recipe() if name.endswith("iterations")}
    shorter = recipe().with_effort(0.1)
    assert {name: getattr(shorter, name) for name in counts} == {name: round(0.1 * n) for name, n in counts.items()}
    others = set(recipe.fields()) - counts.keys()
    assert all(getattr(shorter, name) == getattr(recipe(), name) for name in others)
