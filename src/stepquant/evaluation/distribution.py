"""Distances between sets of images, computed from any features.

With Inception features (`stepquant.evaluation.extractors`) these are FID, sFID, KID, precision and recall, and the
Inception score. With other features the values differ: compare them only for the same data set and sample count, and
do not call them FID, KID or IS.

torchmetrics computes all but precision and recall, which it does not have.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from stepquant.errors import StepquantError

NEIGHBORS = 3
"""k of precision and recall, as in the paper."""
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000


@dataclass(frozen=True)
class GaussianStatistics:
    """First two moments of feature vectors.

    Attributes:
        mean: float64 [D].
        covariance: unbiased, float64 [D, D].
        count: number of feature vectors.
    """

    mean: Tensor
    covariance: Tensor
    count: int

    @classmethod
    def of(cls, features: Tensor) -> GaussianStatistics:
        """Compute the moments of features [N, D], N >= 2."""
        if features.dim() != 2 or features.shape[0] < 2:
            raise StepquantError(f"features of shape {[*features.shape]} have no covariance; expected [N >= 2, D].")
        features = features.double()
        return cls(features.mean(0), features.T.cov(), features.shape[0])

    def save(self, path: Path) -> None:
        """Write the moments as safetensors."""
        save_file({"mean": self.mean, "covariance": self.covariance, "count": torch.tensor(self.count)}, path)

    @classmethod
    def load(cls, path: Path) -> GaussianStatistics:
        """Read what `save` wrote."""
        tensors = load_file(path)
        return cls(tensors["mean"], tensors["covariance"], int(tensors["count"]))


class _Features(nn.Module):
    """Stand-in for the network of a torchmetrics metric: its inputs are features already."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.num_features = dimensions

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(images: Tensor, data: Tensor | GaussianStatistics) -> float:
    """``|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` (arXiv 1706.08500, eq. 6).

    The bias is positive, falls with the count and depends on the model (arXiv 1911.07023): compare distances at equal
    counts only. With no more samples than dimensions the covariance is singular and the bias hides most differences.
    Resizing or JPEG compression changes the distance by more than most improvements do.

    Args:
        images: features [N, D], N >= 2.
        data: features [M, D], or their moments.

    Raises:
        StepquantError: if the dimensions differ, or there are fewer than 2 feature vectors.
    """
    real = data if isinstance(data, GaussianStatistics) else GaussianStatistics.of(data)
    if images.shape[1:] != real.mean.shape:
        raise StepquantError(
            f"features of {images.shape[-1]} and of {len(real.mean)} dimensions cannot be compared; expected equal "
            "dimensions. Extract both with the same network."
        )
    _check_count(images, 2, "a Frechet distance")
    metric = FrechetInceptionDistance(_Features(len(real.mean)))
    metric.real_features_sum = real.mean * real.count
    metric.real_features_cov_sum = real.covariance * (real.count - 1) + real.count * torch.outer(real.mean, real.mean)
    metric.real_features_num_samples = torch.tensor(real.count)
    metric.update(images.double(), real=False)
    return max(0.0, float(metric.compute()))


def kernel_distance(images: Tensor, data: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel ``(x.y / D + 1)^3`` (KID, arXiv 1801.01401).

    The mean over subsets of at most 1,000 images each; all subsets are the same where both sets are that small and
    equally large. Being unbiased, the distance can be negative, and small sets give noisy values. It is often printed
    times 1,000; here it is not.

    Args:
        images: features [N, D], N >= 2.
        data: features [M, D], M >= 2.

    Raises:
        StepquantError: for fewer images, or if the dimensions differ.
    """
    _check_pair(images, data, 2, "a kernel distance")
    size = min(len(images), len(data), KID_SUBSET_SIZE)
    subsets = 1 if len(images) == len(data) == size else KID_SUBSETS
    with _quiet_and_seeded():
        metric = KernelInceptionDistance(_Features(images.shape[1]), subsets=subsets, subset_size=size)
        metric.update(data.double(), real=True)
        metric.update(images.double(), real=False)
        return float(metric.compute()[0])


def inception_score(logits: Tensor, splits: int = 10) -> float:
    """``exp(E KL(p(y|x) || p(y)))``, the mean over splits of the shuffled images (arXiv 1606.03498).

    The score ignores the data and the variety within a class: a model that generates one perfect image per class gets
    the best score there is. It grows with the number of images per split; published values use 5,000.

    Args:
        logits: of a classifier, [N, K].

    Raises:
        StepquantError: for fewer than two images per split.
    """
    _check_count(logits, 2 * splits, f"an Inception score over {splits} splits")
    with _quiet_and_seeded():
        metric = InceptionScore(_Features(logits.shape[1]), splits=splits)
        metric.update(logits.double())
        return float(metric.compute()[0])


def precision_recall(images: Tensor, data: Tensor, neighbors: int = NEIGHBORS) -> tuple[float, float]:
    """Share of images inside the data's manifold, and share of the data inside the images' (arXiv 1904.06991).

    A manifold is the union of balls around each feature vector up to its k-th nearest neighbor. Both values depend on
    the counts and on k; a single outlier has a ball that covers much; a model that copies the data has recall 1.

    Args:
        images: features [N, D], N > k.
        data: features [M, D], M > k.

    Raises:
        StepquantError: for fewer images, or if the dimensions differ.
    """
    _check_pair(images, data, neighbors + 1, "precision and recall")
    images, data = images.double(), data.double()
    distance = torch.cdist(images, data)

    def radius(x: Tensor) -> Tensor:
        return torch.cdist(x, x).kthvalue(neighbors + 1, dim=1).values  # the nearest is the vector itself

    precision = (distance <= radius(data)[None]).any(dim=1).double().mean()
    recall = (distance <= radius(images)[:, None]).any(dim=0).double().mean()
    return float(precision), float(recall)


@contextmanager
def _quiet_and_seeded() -> Iterator[None]:
    """Silence the warnings of metrics that keep all features, and make their random choices reproducible."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(0)
        yield


def _check_pair(images: Tensor, data: Tensor, least: int, what: str) -> None:
    if images.dim() != 2 or data.dim() != 2 or images.shape[1] != data.shape[1]:
        shapes = f"{[*images.shape]} and {[*data.shape]}"
        raise StepquantError(f"features of shape {shapes} cannot be compared; expected [N, D] and [M, D].")
    _check_count(images, least, what)
    _check_count(data, least, what)


def _check_count(vectors: Tensor, least: int, what: str) -> None:
    if len(vectors) < least:
        raise StepquantError(
            f"{len(vectors)} images are too few for {what}; expected {least} or more. Increase the number of images."
        )
