"""The simulation of the benchmark agrees with the reference runtime."""

from __future__ import annotations

import pytest
import torch

from benchmarks.runtime_agreement import Simulation, of_images, of_outputs, one_by_one
from stepquant.runtime.reference import ReferenceKernel
from stepquant.studies.reference import TARGET
from tests.runtime.test_runtimes import SPLITS, STEPS, convolution, linear


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_simulation(split, smoothed):
    for module, x in (
        (convolution(7, 6, 3, padding=1, split=SPLITS[split], smoothed=smoothed), torch.randn(3, 7, 6, 5)),
        (linear(split=SPLITS[split], bits=(4, 8), smoothed=smoothed), torch.randn(3, 5, 7)),
    ):
        for row in range(STEPS):
            expected = ReferenceKernel(module)(x, torch.tensor(row))
            torch.testing.assert_close(Simulation(module)(x, torch.tensor(row)), expected, atol=1e-4, rtol=1e-4)


def test_decibels():
    """Constant errors of 2, 0.2 and 0.02: 0, 20 and 40 dB; the largest dominates the pooled value."""
    simulated = torch.zeros(3, 1, 4, 4)
    images = simulated + torch.tensor([2.0, 0.2, 0.02]).reshape(3, 1, 1, 1)
    assert of_images(images, simulated) == {"pooled": 4.73, "worst": 0.0, "median": 20.0}
    assert of_images(simulated, simulated)["pooled"] == 100.0


def test_decibels_of_outputs():
    """An error of a tenth and of a hundredth of the peak-to-peak: 20 and 40 dB."""
    calls = [{"sample": torch.zeros(1, 4), TARGET: torch.tensor([[0.0, 1.0, 2.0, 4.0]])} for _ in range(3)]
    errors = iter((0.4, 0.04, 0.4))
    assert of_outputs(lambda call: calls[0][TARGET] + next(errors), calls) == {"worst": 20.0, "median": 20.0}
    errors = iter((0.4, 0.04, 0.04))
    assert of_outputs(lambda call: calls[0][TARGET] + next(errors), calls) == {"worst": 20.0, "median": 40.0}


def test_one_by_one():
    """Arguments per sample are split, shared ones are repeated."""

    def denoiser(sample, timestep, class_labels):
        assert len(sample) == len(class_labels) == 1 and timestep.dim() == 0
        return (sample * timestep + class_labels[:, None],)

    call = {"sample": torch.randn(3, 2), "timestep": torch.tensor(5), "class_labels": torch.arange(3)}
    expected = call["sample"] * 5 + torch.arange(3)[:, None]
    assert torch.equal(one_by_one(denoiser, call), expected)
