"""Adam with a cosine schedule that can be interrupted: its state is kept in the workspace every so often."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.progress import Progress
from stepquant.workspace import Workspace

SAVE_EVERY = 50
"""Iterations between two states kept: what an interruption loses at most."""


def optimize(
    groups: list[dict[str, Any]],
    loss: Callable[[int], Tensor],
    iterations: int,
    *,
    workspace: Workspace,
    stage: str,
    description: str,
    progress: Progress,
    clip_norm: float | None = None,
    ema_decay: float = 0.0,
) -> None:
    """Minimise ``loss(iteration)`` over the parameters in `groups`, in place.

    Args:
        groups: Adam's parameter groups: ``params`` and ``lr``; rates fall to zero along a cosine.
        loss: a scalar; everything random in it must follow from the iteration alone, so that a continued run ends in
            the same bytes as an unbroken one. Of several processes, each gives its part of a sum.
        stage: name of the state in the workspace.
        clip_norm: gradients of a larger norm, over all parameters, are scaled down to it.
        ema_decay: above 0, parameters end at their exponential moving average, whose first iterations decay faster.
    """
    if not groups or iterations == 0:
        return
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.Adam(groups, fused=True)
    averages = [parameter.detach().clone() for parameter in parameters] if ema_decay else []
    rates = [group["lr"] for group in optimizer.param_groups]
    with progress.task(description, iterations) as advance:
        done = _restore(workspace, stage, parameters, averages, optimizer)
        advance(done)
        for iteration in range(done, iterations):
            optimizer.zero_grad(set_to_none=True)
            part = loss(iteration)
            if part.requires_grad:
                part.backward()
            workspace.ranks.all_reduce_gradients(parameters)
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, clip_norm)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * iteration / iterations))
            optimizer.step()
            for average, parameter in zip(averages, parameters, strict=False):
                average.lerp_(parameter.detach(), 1 - min(ema_decay, (1 + iteration) / (10 + iteration)))
            advance(1)
            if (iteration + 1) % SAVE_EVERY == 0 or iteration + 1 == iterations:
                workspace.save(stage, _state(iteration + 1, parameters, averages, optimizer))
    for average, parameter in zip(averages, parameters, strict=False):
        parameter.data.copy_(average)


def _state(
    done: int, parameters: list[Tensor], averages: list[Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    state = {"done": torch.tensor(done)} | {f"{index}.average": average for index, average in enumerate(averages)}
    for index, parameter in enumerate(parameters):
        state[f"{index}.value"] = parameter.detach()
        moments = optimizer.state.get(parameter, {})
        state |= {f"{index}.{name}": moments[name] for name in ("exp_avg", "exp_avg_sq", "step") if name in moments}
    return state


def _restore(
    workspace: Workspace,
    stage: str,
    parameters: list[Tensor],
    averages: list[Tensor],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Iterations already done, with parameters and moments put back; 0 if nothing was kept."""
    state = workspace.load(stage)
    if state is None:
        return 0
    for index, parameter in enumerate(parameters):
        parameter.data.copy_(state[f"{index}.value"])
        if f"{index}.step" in state:
            # Moments take the parameter's memory format: the fused optimizer walks all of them in step.
            moments = {name: state[f"{index}.{name}"] for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": state[f"{index}.step"]} | {
                name: torch.empty_like(parameter).copy_(moment) for name, moment in moments.items()
            }
    for index, average in enumerate(averages):
        average.copy_(state[f"{index}.average"])
    return int(state["done"])
