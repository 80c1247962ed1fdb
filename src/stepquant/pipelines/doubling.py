"""Double the samples of one call of a denoiser, where its pipeline makes no calls with more samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepquant.errors import StepquantError
from stepquant.pipelines.arguments import plain_output

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
    output = plain_output(denoiser(**arguments))
    for doubled in _doublings(arguments):
        try:
            output_twice = plain_output(denoiser(**doubled))
        except Exception:  # a denoiser rejects arguments of wrong shapes with errors of any class
            continue
        if _is_twice(output, output_twice):
            return doubled, output, output_twice
    raise StepquantError(
        f"{type(denoiser).__name__} does not give every output twice where the samples of a call are repeated, so that "
        "the arguments of a sample are not known. Give calls with different numbers of samples."
    )


def _doublings(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments with all parts doubled that have as many entries as there are samples; then with all but one."""
    count = next(len(value) for value in arguments.values() if isinstance(value, list) or _has_rows(value))
    candidates = [name for name, value in arguments.items() if _has_entries(value, count)]
    twice = {name: _twice(value, count) for name, value in arguments.items()}
    for left_out in (None, *reversed(candidates)):
        yield {name: arguments[name] if name == left_out else value for name, value in twice.items()}


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def _is_entries(value: Any, count: int) -> bool:
    """Whether a tensor or list may have an entry for each sample."""
    return (isinstance(value, list) or _has_rows(value)) and len(value) == count


def _has_entries(value: Any, count: int) -> bool:
    leaves = pytree.tree_leaves(value, is_leaf=lambda part: _is_entries(part, count))
    return any(_is_entries(leaf, count) for leaf in leaves)


def _twice(value: Any, count: int) -> Any:
    def twice(part: Any) -> Any:
        if not _is_entries(part, count):
            return part
        return torch.cat([part, part]) if isinstance(part, Tensor) else part + part

    return pytree.tree_map(twice, value, is_leaf=lambda part: _is_entries(part, count))


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
