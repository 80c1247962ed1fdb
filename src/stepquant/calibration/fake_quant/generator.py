"""Scales over time: a gain learned for each table row, or an interval generated from the timestep."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stepquant.settings import Settings

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


class Generation(Settings):
    """How TDQ's network generates an activation's intervals."""

    turns: float | None = TURNS
    """Periods of the fastest Fourier feature over the table; None for the paper's features, one radian per timestep."""
    published: bool = False
    """As in the paper: He weights in all layers, the interval itself as the output, starting at the static one, and
    dropout while it is trained. Else the output is a gain on the static interval, fitted to the ranges found row by row
    before training, which goes on without dropout."""
    zero_points: bool = False
    """Generate a zero point for each table row, too, by a second output; else that of the static range serves all."""


class TableGain(nn.Module):
    """An independent gain per table row, learned as its logarithm, so that steps are relative to its size."""

    def __init__(self, rows: int, groups: int) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.zeros(rows, groups))

    def forward(self, row: Tensor) -> Tensor:
        """float32 [groups] or [B, groups] at rows int64 [] or [B]."""
        return self.logarithm[row].exp()


class IntervalGenerator(nn.Module):
    """TDQ's network from the timestep to one activation's interval (arXiv 2306.02316, section 3.3).

    ``interval(t) = softplus(MLP(features(t)))``, of four linear layers. After training it is evaluated at every table
    row and discarded. By default the output is a gain on the static interval, so that learning rates do not depend on
    the activation's size: the last layer starts at zero and softplus^-1(1), so the gain starts at 1 unless `fit` is
    called.

    Args:
        timesteps: float [R], of the table rows.
        groups: number of intervals.
        width: of the three hidden layers.
        turns: periods of the fastest feature over the table; None for the paper's features, one radian per timestep.
        zero_points: add an output for the zero point of each group.
    """

    features: Tensor

    def __init__(
        self,
        timesteps: Tensor,
        groups: int,
        width: int = 64,
        turns: float | None = TURNS,
        *,
        zero_points: bool = False,
    ) -> None:
        super().__init__()
        self.groups = groups
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
        last = nn.Linear(width, groups * (2 if zero_points else 1))
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(math.expm1(1.0)))
        self.layers = nn.Sequential(*layers, nn.Dropout(DROPOUT), last)

    @property
    def last(self) -> nn.Linear:
        """The last layer."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        return last

    @torch.no_grad()
    def start(self, intervals: Tensor, zero_points: Tensor) -> None:
        """Start with He weights in the last layer, too, and its bias at given intervals and zero points.

        Args:
            intervals, zero_points: float [groups]; zero points count only if there is an output for them.
        """
        nn.init.kaiming_normal_(self.last.weight, nonlinearity="relu")
        self.last.bias.copy_(torch.cat([inverse_softplus(intervals), zero_points])[: len(self.last.bias)])

    @torch.no_grad()
    def fit(self, rows: Tensor, gains: Tensor, zero_points: Tensor, ridge: float = 0.1) -> None:
        """Start near given gains, by ridge regression of the last layer on the hidden features of every row.

        Rows in between count as well, with linearly interpolated gains: the fastest features take any value between
        two calibrated steps and would put noise there.

        Args:
            rows: int64 [K], ascending.
            gains: float [K, groups], positive.
            zero_points: float [K, groups]; they count only if there is an output for them.
            ridge: added to the diagonal; pulls the outputs towards their mean over the rows.
        """
        hidden = self.layers[:-2](self.features)
        target = torch.log(torch.expm1(_interpolated(rows, gains, len(hidden))))
        if len(self.last.bias) > self.groups:
            target = torch.cat([target, _interpolated(rows, zero_points, len(hidden))], dim=1)
        center, level = hidden.mean(dim=0), target.mean(dim=0)
        centered = hidden - center
        normal = centered.t() @ centered + ridge * torch.eye(hidden.shape[1], device=hidden.device)
        self.last.weight.copy_(torch.linalg.solve(normal, centered.t() @ (target - level)).t())
        self.last.bias.copy_(level - self.last.weight @ center)

    def forward(self, row: Tensor) -> Tensor:
        """Intervals, float32 [groups] or [B, groups] at rows int64 [] or [B]."""
        return nn.functional.softplus(self.layers(self.features[row])[..., : self.groups])

    def zero_points(self, row: Tensor) -> Tensor:
        """Zero points, of the same shape."""
        outputs: Tensor = self.layers(self.features[row])[..., self.groups :]
        return outputs


def inverse_softplus(values: Tensor) -> Tensor:
    """The x with ``softplus(x) == values``, which are positive."""
    return values + torch.log(-torch.expm1(-values))


def _interpolated(rows: Tensor, values: Tensor, count: int) -> Tensor:
    """Values at rows 0 to count - 1: linear between the given rows, constant outside. [K, G] -> [count, G]."""
    every = torch.arange(count, device=rows.device)
    above = torch.searchsorted(rows, every).clamp(max=len(rows) - 1)
    below = (above - 1).clamp(min=0)
    width = (rows[above] - rows[below]).clamp(min=1)
    share = ((every - rows[below]) / width).clamp(0, 1)[:, None]
    return torch.lerp(values[below], values[above], share)
