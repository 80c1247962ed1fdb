"""Calibrated with one scheduler, run with another: the clock maps any kind of time to a table row."""

from __future__ import annotations

import copy
import functools
import warnings

import diffusers
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stepquant
from stepquant.layers.clock import StepClock
from stepquant.layers.quantized import quantized_modules
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request

SCHEDULERS = {
    "DDIM": diffusers.DDIMScheduler,
    "DDPM": diffusers.DDPMScheduler,
    "PNDM": functools.partial(diffusers.PNDMScheduler, skip_prk_steps=True),  # as Stable Diffusion has it
    "Euler": diffusers.EulerDiscreteScheduler,
    "Euler a": diffusers.EulerAncestralDiscreteScheduler,
    "DPM-Solver++": diffusers.DPMSolverMultistepScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
    "LCM": diffusers.LCMScheduler,
}
FLOW = {"FlowMatchEuler": diffusers.FlowMatchEulerDiscreteScheduler}
BETAS = {"beta_start": 1e-4, "beta_end": 0.02}
SMALL = stepquant.Calibration(samples=8, steps=4)


def times(scheduler, steps: int) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.float()


@given(
    st.sampled_from(sorted(SCHEDULERS | FLOW)), st.sampled_from(sorted(SCHEDULERS | FLOW)), st.integers(2, 40),
    st.integers(2, 40), st.sampled_from([1.0, 1e-3]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_schedulers_get_the_row_of_the_nearest_calibrated_timestep(calibrated, run, of, to, unit):
    """Integers, fractions of sigma schedules, flow times; in the scheduler's units, or in [0, 1] as Flux reads them."""
    every = SCHEDULERS | FLOW
    grid = times(every[calibrated](), of).mul(unit).unique()
    clock = StepClock(grid)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = []
        for time in times(every[run](), to).mul(unit):
            clock.set(time)
            distance = (grid - time).abs()
            assert float(distance[clock.row]) <= float(distance.min()) + 1e-4 * unit
            rows.append(int(clock.row))
    if run != "PNDM":  # which goes back and forth at its start
        assert rows == sorted(rows, reverse=True)
    if (calibrated, of) == (run, to):
        assert set(rows) == set(range(len(grid)))


def test_continuous_times_of_a_sigma_schedule():
    """Euler in continuous mode counts log(sigma) / 4, which is negative near the image."""
    scheduler = diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    grid = times(scheduler, 10)
    assert grid.min() < 0
    clock = StepClock(grid.unique())
    for index, time in enumerate(grid):
        clock.set(time)
        assert int(clock.row) == len(grid) - 1 - index


def warnings_of(clock: StepClock, steps) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for time in steps:
            clock.set(time)
    return [str(warning.message) for warning in caught]


def test_uncalibrated_steps_warn_once():
    grid = times(diffusers.DDIMScheduler(), 50).unique()
    assert warnings_of(StepClock(grid), times(diffusers.DDIMScheduler(), 50)) == []
    assert warnings_of(StepClock(grid), times(diffusers.DDIMScheduler(steps_offset=1), 50)) == []
    messages = warnings_of(StepClock(grid), times(diffusers.DDIMScheduler(), 37))
    assert len(messages) == 1 and "was not calibrated" in messages[0] and "nearest" in messages[0]
    assert warnings_of(StepClock(), times(diffusers.DDIMScheduler(), 37)) == [], "static scales need no step"
    training = StepClock(torch.arange(1000).float())
    euler = times(diffusers.EulerDiscreteScheduler(), 37)
    assert warnings_of(training, euler) == [], "TDQ has a row for every timestep"
    mixed = StepClock(grid)
    assert len(warnings_of(mixed, [torch.tensor([0.0, 490.0, 980.0])])) == 1


@pytest.fixture(scope="module")
def per_step(text_pipeline):
    """Calibrated with DDIM, a table row for each of its steps."""
    quantized = stepquant.quantize(
        text_pipeline, "w8a8", recipe="quest", calibration=SMALL,
        hyperparameters={"iterations": 1, "time_iterations": 1, "rounding_iterations": 0},
    )  # fmt: skip
    assert max(m.format.input.rows for m in quantized_modules(quantized.unet).values() if m.format.input) == 4
    return quantized


@pytest.mark.parametrize("name", SCHEDULERS)
def test_images_with_another_scheduler_and_other_steps(name, per_step, text_pipeline):
    results = []
    for source in (text_pipeline, per_step):
        pipeline = copy.copy(source)
        pipeline.scheduler = SCHEDULERS[name](**BETAS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(generate(pipeline, make_request(pipeline, 3, prompts=["a"]), [0], 0))
    assert torch.isfinite(results[1]).all()
    assert (results[1] - results[0]).abs().mean() < 0.3


def test_flow_matching_with_other_steps(tmp_path):
    pipeline = tiny.sd3(tmp_path)
    inputs = {"max_sequence_length": 8}
    calibration = SMALL.model_copy(update={"size": 16})
    quantized = stepquant.quantize(
        pipeline, "w8a8", recipe="quest", calibration=calibration, prompts=["a"], inputs=inputs,
        hyperparameters={"iterations": 1, "time_iterations": 1, "rounding_iterations": 0},
    )  # fmt: skip
    request = make_request(pipeline, 3, prompts=["a"], size=16, inputs=inputs)
    with pytest.warns(UserWarning, match="was not calibrated"):
        produced = generate(quantized, request, [0], 0)
    assert (produced - generate(pipeline, request, [0], 0)).abs().mean() < 0.3


def test_calibration_sees_both_halves_of_guidance(text_pipeline, monkeypatch):
    """In one batch; and in a pipeline that calls its denoiser twice a step."""
    from stepquant.calibration import collection as trajectories
    from stepquant.calibration.selection import uniform_steps
    from stepquant.progress import Progress

    request = make_request(text_pipeline, 4, prompts=["a"], guidance=5.0)
    steps = uniform_steps(8, 4, torch.Generator().manual_seed(0))
    collect = trajectories.collect

    def conditions(pipeline):
        samples = collect(pipeline, pipeline.unet, request, steps, SMALL, 0, Progress())
        return samples.arguments(slice(None))["encoder_hidden_states"].flatten(1).unique(dim=0).shape[0]

    assert conditions(text_pipeline) == 2

    pipeline = copy.copy(text_pipeline)
    pipeline.unet = tiny.HalvesApart(text_pipeline.unet)
    samples = collect(pipeline, text_pipeline.unet, request, steps, SMALL, 0, Progress())
    assert samples.arguments(slice(None))["encoder_hidden_states"].flatten(1).unique(dim=0).shape[0] == 2
