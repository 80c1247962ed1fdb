"""Double the samples of one call of a denoiser, where its pipeline makes no calls with more samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepquant.errors import StepquantError
from stepquant.pipelines.arguments import plain_output, renewed

TOLERANCE = 1e-3
"""Largest difference between the outputs for the same sample, relative to the largest output."""


@torch.no_grad()
def doubled_call(denoiser: nn.Module, arguments: dict[str, Any]) -> tuple[dict[str, Any], Any, Any]:
    """Find the arguments that hold each sample of a call twice, by calling the denoiser with them.

    Args:
        arguments: the first tensor, or list of tensors, among them holds the noisy samples, along dimension 0.

    Returns:
        The arguments, and the denoiser's outputs for the given ones and for those.

    Raises:
        StepquantError: if no call with more arguments doubled gives each output twice.
    """
    output = plain_output(denoiser(**renewed(arguments)))
    for doubled in _doublings(arguments):
        try:
            output_twice = plain_output(denoiser(**renewed(doubled)))
        except Exception:  # a denoiser rejects arguments of wrong shapes with errors of any class
            continue
        if _is_twice(output, output_twice):
            return doubled, output, output_twice
    raise StepquantError(
        f"{type(denoiser).__name__} does not give every output twice where the samples of a call are repeated, so that "
        "the arguments of a sample are not known. Give calls with different numbers of samples."
    )


def _doublings(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments with all parts doubled that have as many entries as there are samples; then with all but one.

    Lists are taken to have an entry for each sample first, then to have entries with a row for each.
    """
    count = next(len(value) for value in arguments.values() if isinstance(value, list) or _has_rows(value))
    for kinds in ((Tensor, list), (Tensor,)):

        def has_entries(part: Any, kinds: Any = kinds) -> bool:
            return isinstance(part, kinds) and (isinstance(part, list) or _has_rows(part)) and len(part) == count

        def twice(part: Any) -> Any:
            if not has_entries(part):
                return part
            return torch.cat([part, part]) if isinstance(part, Tensor) else part + part

        doubled = {name: pytree.tree_map(twice, value, is_leaf=has_entries) for name, value in arguments.items()}
        leaves = {name: pytree.tree_leaves(value, is_leaf=has_entries) for name, value in arguments.items()}
        candidates = [name for name, parts in leaves.items() if any(map(has_entries, parts))]
        for left_out in (None, *reversed(candidates)):
            yield {name: arguments[name] if name == left_out else value for name, value in doubled.items()}


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _is_twice(output: Any, output_twice: Any) -> bool:
    """Whether an output holds the other one twice."""
    one, two = (
        [torch.stack(part) if isinstance(part, list) else part for part in _parts(value)]
        for value in (output, output_twice)
    )
    if len(one) != len(two):
        return False
    for part, part_twice in zip(one, two, strict=True):
        if isinstance(part, Tensor) and part.dim() > 0:
            expected = torch.cat([part, part])
            allowed = TOLERANCE * max(float(part.abs().max()), 1e-6)
            if expected.shape != part_twice.shape or float((expected - part_twice).abs().max()) > allowed:
                return False
    return True


def _parts(output: Any) -> list[Any]:
    return list(output) if isinstance(output, tuple) else [output]
