"""What a scheduler says about its timesteps."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor


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
    """
    fresh = type(scheduler).from_config(scheduler.config)
    timesteps = getattr(fresh, "timesteps", None)
    if timesteps is None or len(timesteps) == 0:
        return torch.arange(int(scheduler.config.num_train_timesteps)).float()
    return torch.as_tensor(timesteps).detach().float().cpu().unique()
