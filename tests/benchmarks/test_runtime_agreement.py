"""The simulation that runtimes are compared with computes what the reference does, in another way."""

from __future__ import annotations

import pytest
import torch

from benchmarks.runtime_agreement import Simulation, compare
from stepquant.runtime.reference import ReferenceKernel
from tests.runtime.test_runtimes import SPLITS, STEPS, convolution, linear


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_simulation(split, balanced):
    for module, x in (
        (convolution(7, 6, 3, padding=1, split=SPLITS[split], balanced=balanced), torch.randn(3, 7, 6, 5)),
        (linear(split=SPLITS[split], bits=(4, 8), balanced=balanced), torch.randn(3, 5, 7)),
    ):
        for row in range(STEPS):
            expected = ReferenceKernel(module)(x, torch.tensor(row))
            torch.testing.assert_close(Simulation(module)(x, torch.tensor(row)), expected, atol=1e-4, rtol=1e-4)


def test_decibels():
    """Errors of 2, 0.2 and 0.02 throughout: 0, 20 and 40 dB; together the largest counts."""
    simulated = torch.zeros(3, 1, 4, 4)
    pictures = simulated + torch.tensor([2.0, 0.2, 0.02]).reshape(3, 1, 1, 1)
    assert compare(pictures, simulated) == {"pooled": 4.73, "worst": 0.0, "median": 20.0}
    assert compare(simulated, simulated)["pooled"] == 100.0
