"""Quantizers of your own, without a search: weight scales by least squares, activation ranges from a distribution.

stepquant quantize zoo:fashion-ddpm --recipe examples/own_quantizer.py:closed_form --bits w4a8 --out out/own-quantizer
"""

from __future__ import annotations

import torch
from scipy.special import lambertw
from torch import Tensor

from stepquant.calibration.fake_quant.activation import ActivationQuantizer
from stepquant.calibration.fake_quant.weight import WeightQuantizer
from stepquant.calibration.instrument import Instrumented
from stepquant.calibration.selection import uniform_steps
from stepquant.core.affine import SMALLEST_SCALE, quantize
from stepquant.core.ranges import RangeMethod
from stepquant.recipes import Job

ROUNDS = 20


class LeastSquaresWeight(WeightQuantizer):
    """From the range found, in turn: the nearest codes for the scale, the best scale for the codes.

    Neither half can make the squared error of a channel larger, so the last scale is the best of all.
    """

    @torch.no_grad()
    def set_range(self, weight: Tensor, smoothing: Tensor | None) -> None:
        """weight: float [out, in, *kernel]; `self.scale` and `self.zero_point`: float [groups, out]."""
        super().set_range(weight, smoothing)
        values = (
            weight.float() if smoothing is None else weight.float() * smoothing.reshape(-1, *(1,) * (weight.dim() - 2))
        )
        for index, group in enumerate(values.split(self.group_sizes, dim=1)):
            channels, zero_point = group.flatten(1), self.zero_point[index, :, None]
            for _ in range(ROUNDS):
                codes = quantize(channels, self.scale[index, :, None], zero_point, self.bits) - zero_point
                squares = codes.square().sum(dim=1)
                best = (codes * channels).sum(dim=1) / squares
                self.scale[index] = torch.where(squares > 0, best, self.scale[index]).clamp(min=SMALLEST_SCALE)


class LaplaceActivation(ActivationQuantizer):
    """The range of least squared error if values follow Laplace's distribution (ACIQ, arXiv 1810.05723)."""

    def find_range(self, values: Tensor, method: RangeMethod, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """``mean +- a b``, where b is the mean distance to the mean and ``a exp(a) = 3 * 4^bits``; not beyond the ends.

        values: float [groups, n]; low, high: float [groups], the smallest and the largest value.
        """
        mean = values.mean(dim=1)
        reach = float(lambertw(3 * 4**self.bits).real) * (values - mean[:, None]).abs().mean(dim=1)
        return torch.maximum(low, mean - reach), torch.minimum(high, mean + reach)


def closed_form(job: Job) -> Instrumented:
    """Weight scales by least squares, activation ranges from Laplace's distribution; nothing is searched or learned."""
    samples = job.collect(uniform_steps(job.calibration.samples, job.request.steps, job.generator()))
    model = job.instrument(
        "minmax",  # where weights start
        weight_quantizer=LeastSquaresWeight,
        activation_quantizer=LaplaceActivation,
    )
    job.calibrate_ranges(model, samples, "minmax")
    return model
