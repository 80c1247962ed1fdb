from __future__ import annotations

import pytest
import torch

from stepquant.evaluation.intervals import mean_interval
from stepquant.evaluation.metrics import MetricValue


@pytest.mark.parametrize("distribution", ["normal", "skewed"])
def test_intervals_cover_the_mean_at_their_confidence(distribution):
    """400 samples of 64 images: at a true coverage of 95 %, fewer than 1 in 10,000 runs are outside 90 to 98 %."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        values = torch.randn(64, generator=generator, dtype=torch.float64)
        if distribution == "skewed":
            values = values.square()  # as squared errors are: mean 1
        low, high = mean_interval(values)
        assert low < values.mean() < high
        covered += low <= (0 if distribution == "normal" else 1) <= high
    assert 0.90 <= covered / 400 <= 0.98


def test_the_width_falls_with_the_square_root_of_the_count():
    values = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    widths = [high - low for low, high in (mean_interval(values[:count]) for count in (64, 1024))]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.3)
    assert MetricValue.of(values).value == pytest.approx(float(values.double().mean()))


def test_single_and_constant_values():
    assert mean_interval(torch.tensor([3.0])) is None
    assert mean_interval(torch.full((5,), 3.0)) == (3, 3)
    values = torch.rand(20, generator=torch.Generator().manual_seed(2))
    assert mean_interval(values) == mean_interval(values), "the same images give the same interval"
