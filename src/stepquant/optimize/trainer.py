"""The one optimization loop: Adam with a schedule, that can be interrupted and shared among processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from stepquant.distributed import Ranks
from stepquant.workspace import Workspace

SAVE_EVERY = 50
"""Iterations between two states kept: what an interruption loses at most."""

Schedule = Callable[[torch.optim.Optimizer, int, int], LRScheduler]
"""``schedule(optimizer, iterations, done)``: learning rates from iteration `done` on."""


class Checkpoint(NamedTuple):
    """Where the state of an optimization is kept every so often.

    Attributes:
        stage: its name in the workspace.
    """

    workspace: Workspace
    stage: str


def cosine(optimizer: torch.optim.Optimizer, iterations: int, done: int) -> LRScheduler:
    """Rates that fall to zero along a cosine, in closed form: the same after an interruption."""
    return LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / iterations)), last_epoch=done - 1)


def constant(optimizer: torch.optim.Optimizer, _iterations: int, done: int) -> LRScheduler:
    """Rates that stay."""
    return LambdaLR(optimizer, lambda _: 1.0, last_epoch=done - 1)


def by_group(optimizer: torch.optim.Optimizer, iterations: int, done: int) -> LRScheduler:
    """`constant` for the parameter groups with ``constant=True``, `cosine` for the others."""

    def fall(i: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * i / iterations))

    rates = [(lambda _: 1.0) if group.get("constant") else fall for group in optimizer.param_groups]
    return LambdaLR(optimizer, rates, last_epoch=done - 1)


def optimize(
    groups: list[dict[str, Any]],
    loss: Callable[[int], Tensor],
    iterations: int,
    *,
    ranks: Ranks,
    advance: Callable[[int], None],
    schedule: Schedule = cosine,
    fused: bool = True,
    clip_norm: float | None = None,
    ema_decay: float = 0.0,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Minimise ``loss(iteration)`` over the parameters in `groups`, in place.

    Args:
        groups: Adam's parameter groups: ``params`` and ``lr``.
        loss: a scalar; of several processes, each gives its part of a sum. With a `checkpoint`, everything random in it
            must follow from the iteration alone, so that a continued run ends in the same bytes as an unbroken one.
        advance: called with the number of finished iterations.
        fused: torch's fused Adam, which is faster for many parameters and rounds otherwise.
        clip_norm: gradients of a larger norm, over all parameters, are scaled down to it.
        ema_decay: above 0, parameters end at their exponential moving average, whose first iterations decay faster.
    """
    if not groups or iterations == 0:
        advance(iterations)
        return
    parameters = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.Adam([group | {"initial_lr": group["lr"]} for group in groups], fused=fused)
    averages = [parameter.detach().clone() for parameter in parameters] if ema_decay else []
    done = 0 if checkpoint is None else _restore(checkpoint, parameters, averages, optimizer)
    rates = schedule(optimizer, iterations, done)
    advance(done)
    for iteration in range(done, iterations):
        optimizer.zero_grad(set_to_none=True)
        part = loss(iteration)
        if part.requires_grad:
            part.backward()
        ranks.all_reduce_gradients(parameters)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        rates.step()
        for average, parameter in zip(averages, parameters, strict=False):
            average.lerp_(parameter.detach(), 1 - min(ema_decay, (1 + iteration) / (10 + iteration)))
        advance(1)
        if checkpoint is not None and ((iteration + 1) % SAVE_EVERY == 0 or iteration + 1 == iterations):
            checkpoint.workspace.save(checkpoint.stage, _state(iteration + 1, parameters, averages, optimizer))
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
    checkpoint: Checkpoint, parameters: list[Tensor], averages: list[Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Iterations already done, with parameters and moments put back; 0 if nothing was kept."""
    state = checkpoint.workspace.load(checkpoint.stage)
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
