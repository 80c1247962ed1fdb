import pytest
import torch
from scipy import stats

from stepquant.calibration.selection import normal_steps, uniform_steps
from stepquant.errors import StepquantError


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_uniform_steps_are_equally_frequent():
    counts = uniform_steps(103, 20, generator()).bincount(minlength=20)
    assert counts.sum() == 103 and counts.max() - counts.min() == 1
    few = uniform_steps(5, 20, generator())
    assert sorted(few.tolist()) == [0, 5, 10, 14, 19], "fewer samples than steps are spread over all of them"


def test_normal_steps_follow_the_clamped_distribution():
    steps, samples = 1001, 20_000
    chosen = normal_steps(samples, steps, generator(), mean=0.4, deviation=0.1)
    time = 1 - chosen.double() / (steps - 1)
    assert stats.kstest(time.numpy(), stats.norm(0.4, 0.1).cdf).statistic < 0.015
    wide = normal_steps(samples, 10, generator(), mean=0.4, deviation=5.0)
    assert wide.min() == 0 and wide.max() == 9


def test_the_same_seed_selects_the_same_steps():
    for select in (uniform_steps, normal_steps):
        assert torch.equal(select(50, 20, generator()), select(50, 20, generator()))


def test_no_samples_or_no_steps():
    for select in (uniform_steps, normal_steps):
        with pytest.raises(StepquantError, match="at least 1"):
            select(0, 20, generator())
