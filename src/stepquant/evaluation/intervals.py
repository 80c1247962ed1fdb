"""Confidence intervals of means over images."""

from __future__ import annotations

import math

from scipy.stats import bootstrap
from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 1000


def mean_interval(values: Tensor) -> tuple[float, float] | None:
    """Bias-corrected and accelerated bootstrap interval (Efron 1987) of the mean of independent values [N].

    The interval is about other images of the same model, not about other calibrations: repeat with other seeds for
    those. Its coverage is below `CONFIDENCE` for few values of a skewed distribution. Frechet and kernel distances,
    precision and recall have no such interval: a resample repeats images, which shifts these metrics systematically.

    Returns:
        ``(low, high)``; None for a single value.
    """
    values = values.double()
    if len(values) < 2:
        return None
    if bool((values == values[0]).all()):
        return float(values.mean()), float(values.mean())
    low, high = bootstrap(
        (values.numpy(),),
        lambda x, axis: x.mean(axis),
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="BCa",
        vectorized=True,
        rng=0,
    ).confidence_interval
    return (float(low), float(high)) if math.isfinite(low + high) else None
