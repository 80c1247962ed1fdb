from __future__ import annotations

import pytest

import stepquant
from stepquant.models import describe
from stepquant.pipelines.generate import make_request
from stepquant.planning import EFFORTS, make_plan


def plan_of(pipeline, samples, steps, **hyperparameters):
    calibration = stepquant.Calibration(samples=samples, steps=steps)
    return make_plan(pipeline, make_request(pipeline, steps), calibration, hyperparameters)


def test_a_plan_counts_what_there_is_to_do(unconditional_pipeline):
    unet = unconditional_pipeline.unet
    calls = []
    handle = unet.register_forward_pre_hook(lambda *_: calls.append(1))
    plan = plan_of(unconditional_pipeline, 128, 20, iterations=50, batch_size=8)
    handle.remove()
    assert len(calls) == 2, "two steps of one image are drawn for it, and no more"
    assert plan.blocks == len(describe(unet).blocks)
    assert plan.parameters == sum(parameter.numel() for parameter in unet.parameters())
    assert (plan.images, plan.steps, plan.samples, plan.iterations) == (64, 20, 128, 50)
    call = plan.seconds[0] / (64 * 20)
    assert call > 0 and plan.seconds[1] == pytest.approx(call * (4 * 128 + 3 * 50 * 8))
    assert plan.memory > 4 * plan.parameters
    assert "50 iterations each" in str(plan) and "128 samples from 64 images of 20 steps" in str(plan)
    assert "nothing is learned" in str(plan_of(unconditional_pipeline, 4, 2))


def test_efforts_ask_for_more_and_more():
    quick, standard, thorough = EFFORTS["quick"], EFFORTS["standard"], EFFORTS["thorough"]
    assert all(less < more for less, more in zip(quick, standard, strict=True))
    assert all(less < more for less, more in zip(standard, thorough, strict=True))
    defaults = stepquant.Calibration()
    assert (standard.samples, standard.steps) == (defaults.samples, defaults.steps)
