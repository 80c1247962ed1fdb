"""What a scheduler says about its timesteps."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

CONTINUOUS = 1000
"""Timesteps of training that stand for continuous time."""


def most_steps(scheduler: Any) -> int | None:
    """Return the largest number of denoising steps of a scheduler; None if there is no limit.

    Schedulers of discrete time have a limit, the number of timesteps of training. The time of a flow is continuous: its
    number of timesteps is a unit, which OmniGen sets to 1.
    """
    trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    if trained is None:
        return None
    if hasattr(scheduler, "betas"):
        return int(trained)
    candidate = copy.deepcopy(scheduler)
    shift = {"mu": 1.0} if "mu" in inspect.signature(candidate.set_timesteps).parameters else {}
    try:
        candidate.set_timesteps(int(trained) + 1, **shift)
    except ValueError:
        return int(trained)
    return None


def training_timesteps(scheduler: Any) -> Tensor:
    """Return the timesteps that a model was trained at, in the scheduler's own time: float32 [T], ascending.

    A new scheduler has them: the integers of DDPM, the shifted ones of a flow, ``250 ln sigma`` of a consistency model.
    One of continuous time without any (Stable Cascade) gives a thousand.
    """
    fresh = type(scheduler).from_config(scheduler.config)
    timesteps = getattr(fresh, "timesteps", None)
    if timesteps is None or len(timesteps) == 0:
        trained = scheduler.config.get("num_train_timesteps")
        if trained is not None:
            return torch.arange(int(trained)).float()
        fresh.set_timesteps(CONTINUOUS)
        timesteps = fresh.timesteps
    return torch.as_tensor(timesteps).detach().float().cpu().unique()


def as_seen(timesteps: Tensor, seen: Tensor, steps: Tensor) -> Tensor:
    """Convert timesteps of a scheduler to what its denoiser is given: float32 [T], ascending.

    Pipelines pass them on, divide them by 1000 (Flux), or count from noise to image (Z-Image).

    Args:
        timesteps: float32 [T], ascending.
        seen: float [N], the denoiser's timesteps in some calls, over the whole range of time.
        steps: int64 [N], the steps of these calls; step 0 is at pure noise.
    """
    thousandths = float(seen.abs().max()) <= 1 and float(timesteps.abs().max()) > 100
    unit = 1e-3 if thousandths else 1.0
    first, last = seen[steps.argmin()], seen[steps.argmax()]
    return (timesteps if first >= last else (timesteps.max() - timesteps).flip(0)) * unit
