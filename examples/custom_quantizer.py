"""Custom quantizers without a search: weight scales by least squares, activation ranges from a distribution.

stepquant quantize zoo:fashion-ddpm --recipe examples/custom_quantizer.py:ClosedForm --bits w4a8 --out out/custom
"""

from __future__ import annotations

import torch
from scipy.special import lambertw
from torch import Tensor

from stepquant.calibration.fake_quant.weight_quantizers import RoundToNearest
from stepquant.core.affine import SMALLEST_SCALE, quantize
from stepquant.core.ranges import Range
from stepquant.recipes import Recipe, Stage
from stepquant.recipes.stages import AddQuantizers, CalibrateRanges, CollectSamples

ROUNDS = 20


class LeastSquares(RoundToNearest):
    """Alternates between the nearest codes for the scale and the best scale for the codes.

    Neither step increases the squared error of a channel, so the last scale is the best.
    """

    @staticmethod
    def search(values: Tensor, bits: int, method: Range) -> tuple[Tensor, Tensor]:
        """values: float32 [out, n]; returns scale and zero point, float32 [out] each."""
        scale, zero_point = RoundToNearest.search(values, bits, method)
        for _ in range(ROUNDS):
            codes = quantize(values, scale[:, None], zero_point[:, None], bits) - zero_point[:, None]
            squares = codes.square().sum(dim=1)
            best = (codes * values).sum(dim=1) / squares
            scale = torch.where(squares > 0, best, scale).clamp(min=SMALLEST_SCALE)
        return scale, zero_point


def laplace_range(values: Tensor, bits: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The range of least squared error for values that follow Laplace's distribution (ACIQ, arXiv 1810.05723).

    ``mean +- a b``, where b is the mean distance to the mean and ``a exp(a) = 3 * 4^bits``, within the true range.

    Args:
        values: float32 [groups, n], a sample of the activation.
        bits: of the grid.
        low, high: float32 [groups], the smallest and the largest value of the whole activation.
    """
    mean = values.mean(dim=1)
    reach = float(lambertw(3 * 4**bits).real) * (values - mean[:, None]).abs().mean(dim=1)
    return torch.maximum(low, mean - reach), torch.minimum(high, mean + reach)


class ClosedForm(Recipe):
    """Weight scales by least squares, activation ranges from Laplace's distribution; nothing is searched or learned."""

    def stages(self) -> list[Stage]:
        return [
            CollectSamples(),
            AddQuantizers(weight_range="minmax", rounding=LeastSquares),
            CalibrateRanges(method=laplace_range),
        ]
