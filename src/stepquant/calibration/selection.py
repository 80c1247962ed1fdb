"""Choose the denoising steps that calibration samples come from. Step 0 is the sampler's first, at pure noise."""

from __future__ import annotations

import torch
from torch import Tensor

from stepquant.errors import StepquantError


def uniform_steps(samples: int, steps: int, generator: torch.Generator) -> Tensor:
    """Equally many samples from every step (Q-Diffusion, arXiv 2302.04304): int64 [samples], shuffled."""
    _check(samples, steps)
    spread = torch.arange(samples) % steps
    if samples < steps:
        spread = torch.linspace(0, steps - 1, samples).round().long()
    return spread[torch.randperm(samples, generator=generator)]


def normal_steps(
    samples: int, steps: int, generator: torch.Generator, mean: float = 0.4, deviation: float = 0.4
) -> Tensor:
    """Steps at normally distributed timesteps, ``t ~ N(mean T, (deviation T)^2)`` clamped to [0, T] (PTQ4DM, PQD).

    Small timesteps are the *last* steps of the sampler, near the image.

    Returns:
        int64 [samples].
    """
    _check(samples, steps)
    time = (mean + deviation * torch.randn(samples, generator=generator)).clamp(0, 1)
    return ((1 - time) * (steps - 1)).round().long()


def _check(samples: int, steps: int) -> None:
    if samples < 1 or steps < 1:
        raise StepquantError(f"calibration has {samples} samples over {steps} steps; expected at least 1 of each.")
