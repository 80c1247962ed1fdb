"""Confidence intervals of means over images."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import bootstrap
from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` images.

    Attributes:
        interval: its confidence interval; None for a single image.
    """

    value: float
    interval: tuple[float, float] | None
    count: int


def mean_interval(values: Tensor, confidence: float = CONFIDENCE, seed: int = 0) -> Estimate:
    """Mean of independent values [N] with its bias-corrected and accelerated bootstrap interval (Efron 1987).

    The interval is about other images of the same model, not about other calibrations: repeat with other seeds for
    those. Its coverage is below `confidence` for few values of a skewed distribution. Frechet and kernel distances,
    precision and recall have no such interval: a resample repeats images, which shifts these metrics systematically.
    """
    values = values.double()
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Estimate(mean, None, count)
    if bool((values == values[0]).all()):
        return Estimate(mean, (mean, mean), count)
    low, high = bootstrap(
        (values.numpy(),),
        lambda x, axis: x.mean(axis),
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="BCa",
        vectorized=True,
        rng=seed,
    ).confidence_interval
    return Estimate(mean, (float(low), float(high)) if math.isfinite(low + high) else None, count)
