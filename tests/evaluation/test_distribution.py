from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial import cKDTree
from scipy.special import softmax

from stepquant.errors import StepquantError
from stepquant.evaluation.distribution import (
    GaussianStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)


def _samples(mean: list[float], deviation: list[float]) -> torch.Tensor:
    """Vectors float64 [8, 3] with exactly these means and standard deviations, uncorrelated."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).double() * (7 / 8) ** 0.5
    return torch.tensor(mean) + signs * torch.tensor(deviation)


A = _samples([1.0, 2.0, 0.0], [2.0, 3.0, 0.0])
B = _samples([0.0, 4.0, 0.0], [1.0, 5.0, 1.0])


def test_distance_of_known_gaussians():
    # Covariances that commute: |mu_a - mu_b|^2 + sum (sigma_a - sigma_b)^2.
    assert frechet_distance(A, B) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 5) ** 2 + 1, abs=1e-6)
    assert frechet_distance(A, GaussianStatistics.of(B)) == pytest.approx(frechet_distance(A, B))


def test_distance_does_not_depend_on_the_basis_or_the_order():
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()).Q
    assert frechet_distance(A @ rotation, B @ rotation) == pytest.approx(frechet_distance(A, B), abs=1e-6)
    assert frechet_distance(B, A) == pytest.approx(frechet_distance(A, B), abs=1e-6)


def test_distance_to_itself_is_zero_even_with_few_samples():
    features = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)


def test_statistics_of_features():
    features = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    statistics = GaussianStatistics.of(features)
    assert statistics.mean.tolist() == [1, 3]
    assert statistics.covariance.tolist() == [[2, 4], [4, 8]]
    with pytest.raises(StepquantError, match="N >= 2"):
        GaussianStatistics.of(features[:1])


def test_statistics_survive_the_disk(tmp_path):
    statistics = GaussianStatistics.of(torch.randn(9, 4, generator=torch.Generator().manual_seed(2)))
    statistics.save(tmp_path / "s.safetensors")
    loaded = GaussianStatistics.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.mean, statistics.mean)
    assert torch.equal(loaded.covariance, statistics.covariance)
    assert loaded.count == 9


@pytest.fixture(scope="module")
def features():
    """Two overlapping clouds, float32 [90, 6] and [70, 6]."""
    generator = torch.Generator().manual_seed(4)
    mix = torch.randn(6, 6, generator=generator)
    return torch.randn(90, 6, generator=generator) @ mix, torch.randn(70, 6, generator=generator) @ mix + 0.7


def test_frechet_distance_agrees_with_scipy(features):
    a, b = (cloud.double().numpy() for cloud in features)
    root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    mean = a.mean(0) - b.mean(0)
    expected = mean @ mean + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(*features) == pytest.approx(expected, rel=1e-9)


def _mmd(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimate, written as sums over pairs."""
    kernel = lambda x, y: (x @ y / len(x) + 1) ** 3  # noqa: E731
    within = [
        np.mean([kernel(x, y) for i, x in enumerate(side) for j, y in enumerate(side) if i != j]) for side in (a, b)
    ]
    return sum(within) - 2 * np.mean([kernel(x, y) for x in a for y in b])


def test_kernel_distance_is_the_sum_over_pairs(features):
    a, b = (cloud[:30].double().numpy() for cloud in features)
    assert kernel_distance(*(cloud[:30] for cloud in features)) == pytest.approx(_mmd(a, b), rel=1e-9)


def test_kernel_distance_of_sets_of_different_sizes(features):
    a, b = (cloud.double().numpy() for cloud in features)
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    value = kernel_distance(*features)
    assert value == pytest.approx(_mmd(a, b), rel=0.1), "a mean over subsets"
    assert value == kernel_distance(*features), "the same subsets every time"
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random numbers are untouched"


def test_kernel_distance_is_unbiased():
    generator = torch.Generator().manual_seed(5)
    values = torch.tensor(
        [kernel_distance(*torch.randn(2, 8, 3, generator=generator).unbind()) for _ in range(400)]
    ).double()
    # Of one distribution with itself: zero within three standard errors, though each single one is far from it.
    assert abs(values.mean()) < 3 * values.std() / 400**0.5
    assert values.min() < 0 < values.std()


def test_precision_and_recall_agree_with_a_neighbor_tree(features):
    def inside(queries, cloud):
        tree = cKDTree(cloud)
        radius = tree.query(cloud, k=4)[0][:, -1]
        return np.mean([np.any(np.linalg.norm(cloud - query, axis=1) <= radius) for query in queries])

    images, data = (cloud.double().numpy() for cloud in features)
    values = precision_recall(*features)
    assert values == (pytest.approx(inside(images, data)), pytest.approx(inside(data, images)))
    assert 0.1 < min(values) < max(values) < 1


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


def test_score_agrees_with_its_formula():
    logits = 2 * torch.randn(60, 5, generator=torch.Generator().manual_seed(7))
    probability = softmax(logits.double().numpy(), axis=1)
    divergence = (probability * np.log(probability / probability.mean(axis=0))).sum(axis=1)
    assert inception_score(logits, splits=1) == pytest.approx(np.exp(divergence.mean()), rel=1e-9)
    certain = torch.eye(4).repeat(5, 1) * 100
    assert inception_score(certain, splits=1) == pytest.approx(4)


def test_too_few_images_and_other_features_are_rejected(features):
    a, b = features
    for measured, message in (
        (lambda: kernel_distance(a[:1], b), "expected 2 or more"),
        (lambda: precision_recall(a, b[:3]), "expected 4 or more"),
        (lambda: inception_score(a[:19]), "expected 20 or more"),
        (lambda: kernel_distance(a, b[:, :3]), "cannot be compared"),
        (lambda: frechet_distance(a, b[:, :3]), "6 and of 3 dimensions"),
        (lambda: frechet_distance(a[:1], b), "expected 2 or more"),
    ):
        with pytest.raises(StepquantError, match=message):
            measured()


def test_all_values_agree_with_torch_fidelity(features):
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
        **isc_features_to_metric(a, splits=1, shuffle=False),
    }
    precision, recall = precision_recall(a, b)
    ours = {
        "frechet_inception_distance": frechet_distance(a, b),
        "kernel_inception_distance_mean": kernel_distance(a, b),
        "precision": precision,
        "recall": recall,
        "inception_score_mean": inception_score(a, splits=1),
    }
    assert {name: theirs[name] for name in ours} == pytest.approx(ours, rel=1e-6)
