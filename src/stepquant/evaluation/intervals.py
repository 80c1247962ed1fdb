"""How sure a figure is: confidence intervals of means over images."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import bootstrap
from torch import Tensor

CONFIDENCE = 0.95
RESAMPLES = 1000


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` images and the interval that holds the true one with probability `CONFIDENCE`.

    Attributes:
        interval: lower and upper end; None where a single image leaves nothing to say.
    """

    value: float
    interval: tuple[float, float] | None
    count: int


def mean_interval(values: Tensor, confidence: float = CONFIDENCE, seed: int = 0) -> Estimate:
    """Mean of independent values [N] with its bias-corrected and accelerated bootstrap interval (Efron 1987).

    Traps: it is about other images of the same model, not about other calibrations: for those, repeat with seeds.
    Its coverage falls short of `confidence` for few values of a skewed distribution. There is none for Frechet and
    kernel distances, nor for precision and recall: a resample holds images twice, which moves them systematically.
    """
    numbers = values.double()
    mean = float(numbers.mean())
    if len(numbers) < 2:
        return Estimate(mean, None, len(numbers))
    if bool((numbers == numbers[0]).all()):
        return Estimate(mean, (mean, mean), len(numbers))
    found = bootstrap(
        (numbers.numpy(),),
        lambda x, axis: x.mean(axis),
        n_resamples=RESAMPLES,
        confidence_level=confidence,
        method="BCa",
        vectorized=True,
        rng=seed,
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    return Estimate(mean, (low, high) if math.isfinite(low + high) else None, len(numbers))
