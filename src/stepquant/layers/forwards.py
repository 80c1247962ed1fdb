"""Replace the forward of modules for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of modules for the duration of the context.

    One that was replaced before, as by an `InterceptedForward` or a hook of accelerate, is put back afterwards.
    """
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, replaced in before.items():
            vars(module).pop("forward", None)
            if replaced is not None:
                module.forward = replaced
