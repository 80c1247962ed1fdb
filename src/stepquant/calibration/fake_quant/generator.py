"""Gains on a scale: learned for each table row, or generated from the timestep."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LONGEST_PERIOD = 10_000.0
"""t_max of the Fourier features (TDQ, section 3.3)."""

TURNS = 4.0
"""Periods of the fastest feature over the table. The paper's has one per six timesteps: a network trained on every
timestep (QAT) learns to ignore it, but one trained on the 20 or 50 steps of a sampler puts noise between them."""

DROPOUT = 0.2
"""Probability, of the last hidden layer, in training (TDQ, public code)."""


def time_features(timesteps: Tensor, dimensions: int = 128) -> Tensor:
    """Geometric Fourier features ``sin(t / t_max^(2i/d)), cos(t / t_max^(2i/d))``, i = 0 .. d/2 - 1 (TDQ, eq. 6).

    Args:
        timesteps: float [R].
        dimensions: d, even.

    Returns:
        float32 [R, dimensions].
    """
    half = dimensions // 2
    rates = torch.exp(-math.log(LONGEST_PERIOD) * torch.arange(half) / half)
    angles = timesteps.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class TableGain(nn.Module):
    """An independent gain per table row, learned as its logarithm, so that steps are relative to its size."""

    def __init__(self, rows: int, groups: int) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.zeros(rows, groups))

    def forward(self, row: Tensor) -> Tensor:
        """float32 [groups] or [B, groups] at rows int64 [] or [B]."""
        return self.logarithm[row].exp()


class IntervalGenerator(nn.Module):
    """TDQ's network from the timestep to the gain of one activation's interval (arXiv 2306.02316, section 3.3).

    ``gain(t) = softplus(MLP(features(t)) + softplus^-1(1))``. The gain times the static scale is the paper's interval;
    with a gain, learning rates do not depend on the activation's size. The last layer starts at zero, so the gain
    starts at 1 unless `fit` is called. After training it is evaluated at every table row and discarded.

    Args:
        timesteps: float [R], of the table rows.
        groups: number of gains.
        width: of the three hidden layers.
        turns: periods of the fastest feature over the table; None for the paper's features, one radian per timestep.
    """

    features: Tensor

    def __init__(self, timesteps: Tensor, groups: int, width: int = 64, turns: float | None = TURNS) -> None:
        super().__init__()
        span = float((timesteps.max() - timesteps.min()).clamp(min=1))
        rate = 1.0 if turns is None else turns * 2 * math.pi / span
        self.register_buffer("features", time_features(timesteps * rate))
        layers: list[nn.Module] = []
        size = self.features.shape[1]
        for _ in range(3):
            linear = nn.Linear(size, width)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU()]
            size = width
        last = nn.Linear(width, groups)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(math.expm1(1.0)))
        self.layers = nn.Sequential(*layers, nn.Dropout(DROPOUT), last)

    @torch.no_grad()
    def fit(self, rows: Tensor, gains: Tensor, ridge: float = 0.1) -> None:
        """Start near given gains, by ridge regression of the last layer on the hidden features of every row.

        Rows in between count as well, with linearly interpolated gains: the fastest features take any value between
        two calibrated steps and would put noise there.

        Args:
            rows: int64 [K], ascending.
            gains: float [K, groups], positive.
            ridge: added to the diagonal; pulls the gain towards its mean over the rows.
        """
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        hidden = self.layers[:-2](self.features)
        target = torch.log(torch.expm1(_interpolated(rows, gains, len(hidden))))
        center, level = hidden.mean(dim=0), target.mean(dim=0)
        centered = hidden - center
        normal = centered.t() @ centered + ridge * torch.eye(hidden.shape[1], device=hidden.device)
        last.weight.copy_(torch.linalg.solve(normal, centered.t() @ (target - level)).t())
        last.bias.copy_(level - last.weight @ center)

    def forward(self, row: Tensor) -> Tensor:
        """float32 [groups] or [B, groups] at rows int64 [] or [B]."""
        return nn.functional.softplus(self.layers(self.features[row]))


def _interpolated(rows: Tensor, values: Tensor, count: int) -> Tensor:
    """Values at rows 0 to count - 1: linear between the given rows, constant outside. [K, G] -> [count, G]."""
    every = torch.arange(count, device=rows.device)
    above = torch.searchsorted(rows, every).clamp(max=len(rows) - 1)
    below = (above - 1).clamp(min=0)
    width = (rows[above] - rows[below]).clamp(min=1)
    share = ((every - rows[below]) / width).clamp(0, 1)[:, None]
    return torch.lerp(values[below], values[above], share)
