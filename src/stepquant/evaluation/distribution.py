"""Sets of images as distributions, over any features: Frechet distance, kernel distance, precision and recall, score.

The arithmetic alone. With Inception's features (`stepquant.evaluation.extractors`) these are FID, sFID, KID, precision
and recall, and the Inception score; with any other they have other values, compare models on the same data set at the
same sample count only, and are never to be called so.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepquant.errors import StepquantError

NEIGHBOURS = 3
"""k of precision and recall, as in their paper."""


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
    parts to drop.

    Traps: biased upwards by an amount that falls with the count and depends on the model (arXiv 1911.07023), so only
    distances at equal counts compare; with no more samples than dimensions the covariance is singular and the bias
    swallows what is looked for. Resizing and JPEG before the features move it by more than most improvements.

    Raises:
        StepquantError: if the two have different dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise StepquantError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions have no distance.")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, float(distance))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy under the kernel ``(x.y / D + 1)^3`` (KID, arXiv 1801.01401).

    Features [N, D] and [M, D]. One estimate from all of them, where others average over subsets of 1,000: the same
    expectation, a smaller variance.

    Traps: unbiased, so it may be negative, and small sets give noise rather than a wrong level. Often printed
    times 1,000; this is not.

    Raises:
        StepquantError: for fewer than 2 of either.
    """
    _at_least(2, a, b, "a kernel distance")
    a, b = a.double(), b.double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def precision_recall(images: Tensor, data: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of images inside the data's manifold, and of the data inside the images' (arXiv 1904.06991).

    A manifold is the union of balls around each feature vector up to its k-th nearest neighbour. Features [N, D] and
    [M, D].

    Traps: both depend on the counts and on k; a single outlier has a ball that covers much; recall of a model that
    copies the data is 1.

    Raises:
        StepquantError: for no more than k of either.
    """
    _at_least(neighbours + 1, images, data, "precision and recall")
    images, data = images.double(), data.double()
    distance = torch.cdist(images, data)

    def radius(x: Tensor) -> Tensor:
        return torch.cdist(x, x).kthvalue(neighbours + 1, dim=1).values  # the nearest of all is the vector itself

    precision = (distance <= radius(data)[None]).any(dim=1).double().mean()
    recall = (distance <= radius(images)[:, None]).any(dim=0).double().mean()
    return float(precision), float(recall)


def inception_score(logits: Tensor, splits: int = 10) -> float:
    """``exp(E KL(p(y|x) || p(y)))``, mean over splits (arXiv 1606.03498); logits [N, K] of a classifier.

    Traps: says nothing about the data, nor about variety within a class; a model that draws one perfect image of
    each class has the best score there is. Grows with the images a split: the usual figures come from 5,000.

    Raises:
        StepquantError: for fewer than two images a split.
    """
    if len(logits) < 2 * splits:
        raise StepquantError(
            f"{len(logits)} images are too few for a score over {splits} splits: draw {2 * splits} or more."
        )
    scores = []
    for part in logits.double().tensor_split(splits):
        marginal = part.softmax(dim=1).mean(dim=0, keepdim=True).log()
        divergence = (part.softmax(dim=1) * (part.log_softmax(dim=1) - marginal)).sum(dim=1).mean()
        scores.append(float(divergence.exp()))
    return sum(scores) / splits


def save_statistics(statistics: GaussianStatistics, path: Path) -> None:
    """Write moments as safetensors: ``mean``, ``covariance``, ``count``."""
    count = torch.tensor(statistics.count)
    save_file({"mean": statistics.mean, "covariance": statistics.covariance, "count": count}, path)


def load_statistics(path: Path) -> GaussianStatistics:
    """Read what `save_statistics` wrote."""
    tensors = load_file(path)
    return GaussianStatistics(tensors["mean"], tensors["covariance"], int(tensors["count"]))


def _at_least(least: int, a: Tensor, b: Tensor, what: str) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise StepquantError(f"{what} needs two lists of vectors of one length, given {[*a.shape]} and {[*b.shape]}.")
    if min(len(a), len(b)) < least:
        raise StepquantError(f"{what} needs at least {least} images of each, given {len(a)} and {len(b)}: draw more.")
