from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial import cKDTree
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from stepquant.errors import StepquantError
from stepquant.evaluation.distribution import (
    GaussianStatistics,
    frechet_distance,
    gaussian_statistics,
    inception_score,
    kernel_distance,
    load_statistics,
    precision_recall,
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


class _Identity(nn.Module):
    """Hands torchmetrics features as if they were images."""

    num_features = 6

    def forward(self, features):
        return features


@pytest.fixture(scope="module")
def features():
    """Two overlapping clouds, float32 [90, 6] and [70, 6]."""
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(6, 6, generator=generator)
    return torch.randn(90, 6, generator=generator) @ mix, torch.randn(70, 6, generator=generator) @ mix + 0.7


def test_frechet_distance_is_that_of_torchmetrics_and_scipy(features):
    ours = frechet_distance(*map(gaussian_statistics, features))
    theirs = FrechetInceptionDistance(feature=_Identity()).set_dtype(torch.float64)
    for cloud, real in zip(features, (True, False), strict=True):
        theirs.update(cloud, real=real)
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-6)
    a, b = (cloud.double().numpy() for cloud in features)
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    mean = a.mean(0) - b.mean(0)
    assert ours == pytest.approx(mean @ mean + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root), rel=1e-9)


def test_kernel_distance_is_that_of_torchmetrics(features):
    a, b = (cloud[:70] for cloud in features)
    theirs = KernelInceptionDistance(feature=_Identity(), subsets=1, subset_size=70).set_dtype(torch.float64)
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    assert kernel_distance(a, b) == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_kernel_distance_is_unbiased():
    generator = torch.Generator().manual_seed(5)
    values = torch.tensor(
        [kernel_distance(*torch.randn(2, 8, 3, generator=generator).unbind()) for _ in range(400)]
    ).double()
    # Of one distribution with itself: zero within three standard errors, though each single one is far from it.
    assert abs(values.mean()) < 3 * values.std() / 400**0.5
    assert values.min() < 0 < values.std()


def test_precision_and_recall_are_those_of_a_tree_of_neighbours(features):
    def inside(queries, cloud):
        tree = cKDTree(cloud)
        radius = tree.query(cloud, k=4)[0][:, -1]
        return np.mean([np.any(np.linalg.norm(cloud - query, axis=1) <= radius) for query in queries])

    images, data = (cloud.double().numpy() for cloud in features)
    found = precision_recall(*features)
    assert found == (pytest.approx(inside(images, data)), pytest.approx(inside(data, images)))
    assert 0.1 < min(found) < max(found) < 1


def test_precision_falls_with_bad_images_and_recall_with_missing_ones():
    generator = torch.Generator().manual_seed(6)
    data = torch.randn(200, 2, generator=generator)
    assert precision_recall(data, data) == (1, 1)
    outside = torch.cat([data[:100], torch.randn(100, 2, generator=generator) + 50])
    assert precision_recall(outside, data)[0] == pytest.approx(0.5, abs=0.01)
    half = data[data[:, 0] > 0]
    precision, recall = precision_recall(half, data)
    assert precision == 1
    assert recall < 0.7


def test_score_is_that_of_torchmetrics():
    logits = 2 * torch.randn(60, 5, generator=torch.Generator().manual_seed(7))
    theirs = InceptionScore(feature=_Identity(), splits=1)
    theirs.update(logits)
    assert inception_score(logits, splits=1) == pytest.approx(float(theirs.compute()[0]), rel=1e-5)
    certain = torch.eye(4).repeat(5, 1) * 100
    assert inception_score(certain, splits=5) == pytest.approx(4)


def test_too_few_images_and_other_features_are_refused(features):
    a, b = features
    for measured, message in (
        (lambda: kernel_distance(a[:1], b), "at least 2 images"),
        (lambda: precision_recall(a, b[:3]), "at least 4 images"),
        (lambda: inception_score(a[:19]), "draw 20 or more"),
        (lambda: kernel_distance(a, b[:, :3]), "vectors of one length"),
        (lambda: frechet_distance(gaussian_statistics(a), gaussian_statistics(b[:, :3])), "6 and of 3 dimensions"),
    ):
        with pytest.raises(StepquantError, match=message):
            measured()


def test_all_of_it_is_that_of_torch_fidelity(features):
    """With torch-fidelity and torchvision installed (the extra `inception`)."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    a, b = (cloud[:70].double() for cloud in features)
    statistics = [fid_features_to_statistics(cloud) for cloud in (a, b)]
    theirs = {
        **fid_statistics_to_metric(*statistics, False),
        **kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=70, verbose=False),
        **prc_features_to_metric(a, b, verbose=False),
        **isc_features_to_metric(a, splits=10, shuffle=False),
    }
    precision, recall = precision_recall(a, b)
    ours = {
        "frechet_inception_distance": frechet_distance(*map(gaussian_statistics, (a, b))),
        "kernel_inception_distance_mean": kernel_distance(a, b),
        "precision": precision,
        "recall": recall,
        "inception_score_mean": inception_score(a, splits=10),
    }
    assert {name: theirs[name] for name in ours} == pytest.approx(ours, rel=1e-6)
