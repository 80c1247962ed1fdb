from __future__ import annotations

import pytest
import torch

from stepquant.errors import StepquantError
from stepquant.evaluation.distribution import (
    GaussianStatistics,
    frechet_distance,
    gaussian_statistics,
    load_statistics,
    save_statistics,
)


def _diagonal(mean: list[float], variance: list[float]) -> GaussianStatistics:
    return GaussianStatistics(torch.tensor(mean).double(), torch.diag(torch.tensor(variance).double()), 100)


def test_distance_of_known_gaussians():
    # Covariances that commute: |mu_a - mu_b|^2 + sum (sigma_a - sigma_b)^2.
    a, b = _diagonal([1.0, 2.0, 0.0], [4.0, 9.0, 0.0]), _diagonal([0.0, 4.0, 0.0], [1.0, 25.0, 1.0])
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 5) ** 2 + 1, abs=1e-9)


def test_distance_does_not_depend_on_the_basis_or_the_order():
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()).Q
    a, b = _diagonal([1.0, 2.0, 0.0], [4.0, 9.0, 0.5]), _diagonal([0.0, 4.0, 0.0], [1.0, 25.0, 1.0])
    turned = [GaussianStatistics(rotation @ s.mean, rotation @ s.covariance @ rotation.T, s.count) for s in (a, b)]
    assert frechet_distance(*turned) == pytest.approx(frechet_distance(a, b), abs=1e-9)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), abs=1e-9)


def test_distance_to_itself_is_zero_even_with_few_samples():
    features = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    statistics = gaussian_statistics(features)
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-6)


def test_statistics_of_features():
    features = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    statistics = gaussian_statistics(features)
    assert statistics.mean.tolist() == [1, 3]
    assert statistics.covariance.tolist() == [[2, 4], [4, 8]]
    with pytest.raises(StepquantError, match="at least 2"):
        gaussian_statistics(features[:1])


def test_statistics_survive_the_disk(tmp_path):
    statistics = gaussian_statistics(torch.randn(9, 4, generator=torch.Generator().manual_seed(2)))
    save_statistics(statistics, tmp_path / "s.safetensors")
    loaded = load_statistics(tmp_path / "s.safetensors")
    assert torch.equal(loaded.mean, statistics.mean)
    assert torch.equal(loaded.covariance, statistics.covariance)
    assert loaded.count == 9
