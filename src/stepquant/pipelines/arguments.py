"""Arguments of a denoiser's call as named tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def flatten(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """An argument as named values: itself, or the entries of a dictionary or list under dotted names."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield f"{name}.{key}", entry
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield f"{name}.{index}", entry
    else:
        yield name, value


def nest(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments from flat names, the inverse of `flatten`."""
    arguments: dict[str, Any] = {}
    for name, tensor in tensors.items():
        outer, _, inner = name.partition(".")
        if inner.isdigit():
            arguments[outer] = [*arguments.get(outer, []), tensor]
        else:
            arguments[outer] = {**arguments.get(outer, {}), inner: tensor} if inner else tensor
    return arguments
