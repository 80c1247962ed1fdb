"""Timesteps of training and the limit of steps are those of the scheduler, as the denoiser is given them."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import tiny
import torch

from stepquant.pipelines.recording import record_calls
from stepquant.pipelines.request import make_request
from stepquant.pipelines.schedule import as_seen, most_steps, training_timesteps


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"])
def test_discrete_schedulers_were_trained_at_integers(name):
    scheduler = getattr(diffusers, name)(num_train_timesteps=50)
    scheduler.set_timesteps(7)
    assert torch.equal(training_timesteps(scheduler), torch.arange(50).float())
    assert most_steps(scheduler) == 50


def test_a_consistency_model_has_the_logarithm_of_its_noise():
    """Karras' 40 noise levels from 0.002 to 80, in ``250 ln sigma`` (arXiv 2303.01469, appendix C)."""
    scheduler = diffusers.CMStochasticIterativeScheduler()
    sigmas = (np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 40)) ** 7
    expected = torch.from_numpy(250 * np.log(sigmas + 1e-44)).float()
    assert torch.allclose(training_timesteps(scheduler), expected, atol=1e-3)
    assert most_steps(scheduler) == 40


def test_the_time_of_a_flow_is_shifted():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    sigmas = torch.arange(1, 1001) / 1000
    assert torch.allclose(training_timesteps(scheduler), 1000 * 3 * sigmas / (1 + 2 * sigmas), atol=1e-3)
    assert most_steps(scheduler) is None
    assert most_steps(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)) is None


def test_continuous_time():
    timesteps = training_timesteps(diffusers.DDPMWuerstchenScheduler())
    assert len(timesteps) > 500 and timesteps[0] >= 0 and timesteps[-1] == 1
    assert most_steps(diffusers.DDPMWuerstchenScheduler()) is None
    assert most_steps(None) is None


def test_the_denoiser_of_flux_is_given_thousandths(tmp_path):
    pipeline = tiny.flux(tmp_path)
    request = make_request(pipeline, 4, prompts=["a"], size=16, inputs={"max_sequence_length": 8})
    calls = record_calls(pipeline, "transformer", request, [0], 0, steps=None)
    seen = torch.cat([call.arguments["timestep"] for call in calls])
    rows = as_seen(training_timesteps(pipeline.scheduler), seen, torch.arange(4))
    assert len(rows) == 1000 and float(rows[-1]) == 1 and float(rows[0]) == pytest.approx(1e-3)
    assert float((rows[:, None] - seen).abs().min(dim=0).values.max()) < 1e-3, "each call is near a row"


def test_time_that_runs_from_noise_to_image_is_reversed():
    """Z-Image: ``(1000 - t) / 1000``."""
    timesteps = torch.tensor([1.0, 400.0, 1000.0])
    seen, steps = (1000 - torch.tensor([1000.0, 500.0])) / 1000, torch.tensor([0, 1])
    assert torch.allclose(as_seen(timesteps, seen, steps), torch.tensor([0.0, 0.6, 0.999]))
    assert math.isclose(float(as_seen(timesteps, torch.tensor([999.0, 20.0]), steps)[1]), 400)
