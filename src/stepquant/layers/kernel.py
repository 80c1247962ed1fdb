"""The interface between a quantized layer and the runtime that executes it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


class Kernel(nn.Module):
    """Executes one layer: ``forward(x, row) -> y``. x is float [B, ...]; row is the clock's, int64 [] or [B].

    A kernel never changes once it is built, so copies of a model share it; a layer that moves to another device gets
    another. Whatever a kernel registers as a buffer is put on the layer's device before it first runs.

    Attributes:
        fuses: whether it takes what is before and after a convolution with it, as ``runtime/native/blocks.py`` needs.
    """

    fuses = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernel:
        return self


def opaque(function: FunctionT) -> FunctionT:
    """Let torch.compile call `function` without tracing it: kernels pass addresses of tensors to other code."""
    untraced = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return untraced(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return cast(FunctionT, call)
