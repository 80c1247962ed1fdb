"""How the scale of an activation may depend on the denoising step: a free gain a table row, or a function of time."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LONGEST_PERIOD = 10_000.0
"""t_max of the Fourier features (TDQ, section 3.3)."""

DROPOUT = 0.2
"""Of the last hidden layer, while learning (TDQ, public code)."""


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
    """A gain for every table row, each learned on its own; as its logarithm, so steps are relative to its size."""

    def __init__(self, rows: int, groups: int) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.zeros(rows, groups))

    def forward(self, row: Tensor) -> Tensor:
        """float32 [groups] or [B, groups] at rows int64 [] or [B]."""
        return self.logarithm[row].exp()


class IntervalGenerator(nn.Module):
    """TDQ's network from the timestep to the gain of one activation's interval (arXiv 2306.02316, section 3.3).

    ``gain(t) = softplus(MLP(features(t)) + softplus^-1(1))``. Times the static scale it is the paper's interval; the
    gain form makes learning rates independent of the activation's size. The last layer starts at zero, so learning
    starts exactly at the static scale. Evaluated at every table row when it settles, and then dropped.

    Args:
        timesteps: float [R], of the table rows.
        groups: scales it puts out.
        width: of the two hidden layers between the first and the last.
    """

    features: Tensor

    def __init__(self, timesteps: Tensor, groups: int, width: int = 64) -> None:
        super().__init__()
        self.register_buffer("features", time_features(timesteps))
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

    def forward(self, row: Tensor) -> Tensor:
        """float32 [groups] or [B, groups] at rows int64 [] or [B]."""
        return nn.functional.softplus(self.layers(self.features[row]))
