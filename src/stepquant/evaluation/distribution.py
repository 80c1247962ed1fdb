"""How far a set of pictures is from the data, as a distribution: the Frechet distance between classifier features.

This is the formula of the FID with another feature extractor: its values compare models on the same data set with the
same sample count, and are never to be called FID.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepquant.errors import StepquantError


@dataclass(frozen=True)
class GaussianStatistics:
    """First two moments of feature vectors: mean float64 [D], covariance float64 [D, D], and how many there were."""

    mean: Tensor
    covariance: Tensor
    count: int


def gaussian_statistics(features: Tensor) -> GaussianStatistics:
    """Moments of features [N, D], N >= 2; the covariance is the unbiased one."""
    if features.dim() != 2 or features.shape[0] < 2:
        raise StepquantError(f"statistics need at least 2 feature vectors, given shape {list(features.shape)}.")
    features = features.double()
    return GaussianStatistics(features.mean(0), features.T.cov(), features.shape[0])


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """``|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` (arXiv 1706.08500, eq. 6).

    The trace of the root is taken from the eigenvalues of ``C_a^(1/2) C_b C_a^(1/2)``, which is symmetric: no complex
    parts to drop. With fewer samples than dimensions the estimate is biased upwards; compare at equal counts only.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float(distance))


def save_statistics(statistics: GaussianStatistics, path: Path) -> None:
    """Write moments as safetensors: ``mean``, ``covariance``, ``count``."""
    count = torch.tensor(statistics.count)
    save_file({"mean": statistics.mean, "covariance": statistics.covariance, "count": count}, path)


def load_statistics(path: Path) -> GaussianStatistics:
    """Read what `save_statistics` wrote."""
    tensors = load_file(path)
    return GaussianStatistics(tensors["mean"], tensors["covariance"], int(tensors["count"]))
