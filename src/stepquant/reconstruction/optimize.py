"""Adam with a cosine schedule that can be interrupted: its state is kept in the workspace every so often."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
) -> None:
    """Minimise ``loss(iteration)`` over the parameters in `groups`, in place.

    Args:
        groups: Adam's parameter groups: ``params`` and ``lr``; rates fall to zero along a cosine.
        loss: a scalar; everything random in it must follow from the iteration alone, so that a continued run ends in
            the same bytes as an unbroken one.
        stage: name of the state in the workspace.
    """
    if not groups or iterations == 0:
        return
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.Adam(groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    with progress.task(description, iterations) as advance:
        done = _restore(workspace, stage, parameters, optimizer)
        advance(done)
        for iteration in range(done, iterations):
            optimizer.zero_grad(set_to_none=True)
            loss(iteration).backward()
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * iteration / iterations))
            optimizer.step()
            advance(1)
            if (iteration + 1) % SAVE_EVERY == 0 or iteration + 1 == iterations:
                workspace.save(stage, _state(iteration + 1, parameters, optimizer))


def _state(done: int, parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {"done": torch.tensor(done)}
    for index, parameter in enumerate(parameters):
        state[f"{index}.value"] = parameter.detach()
        moments = optimizer.state.get(parameter, {})
        state |= {f"{index}.{name}": moments[name] for name in ("exp_avg", "exp_avg_sq", "step") if name in moments}
    return state


def _restore(workspace: Workspace, stage: str, parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Iterations already done, with parameters and moments put back; 0 if nothing was kept."""
    state = workspace.load(stage)
    if state is None:
        return 0
    for index, parameter in enumerate(parameters):
        parameter.data.copy_(state[f"{index}.value"])
        if f"{index}.step" in state:
            optimizer.state[parameter] = {name: state[f"{index}.{name}"] for name in ("step", "exp_avg", "exp_avg_sq")}
    return int(state["done"])
