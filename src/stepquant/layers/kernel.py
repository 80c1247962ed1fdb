"""The interface between a quantized layer and the runtime that executes it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, cast

import torch
from torch import nn

from stepquant.core.dynamic import DynamicFormat
from stepquant.core.transforms import Smoothing
from stepquant.layers.format import LayerFormat

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


UNLIMITED = 1 << 62
INT32_PRODUCTS = (1 << 31) // (255 * 128)
"""Products of an activation code and a weight that an int32 accumulator holds in the worst case."""


class Layer(Protocol):
    """What a kernel looks at to tell whether it executes a layer; a `QuantizedModule` has it."""

    format: LayerFormat
    weight_shape: tuple[int, ...]


@dataclass(frozen=True)
class Capabilities:
    """The layers that a kernel executes; any other runs by the reference.

    Attributes:
        transforms: kinds of `LayerTransform`; None for all.
        integer: takes layers whose input is quantized, else those whose input stays in floating point.
        dynamic: takes layers whose input has a dynamic grid.
        kernel_dims: dimensions of the weight behind [out, in]: 0 for a linear, 1 to 3 for a convolution.
        transposed: transposed convolutions.
        channel_groups: several scales along the input channels, of the weight or the input.
        grouped_convolutions: convolutions with groups.
        grouped_both: grouped convolutions that have channel groups as well.
        bits_by_row: takes layers whose input has other bits in some rows.
        most_products: products of an output's longest sum.
    """

    transforms: frozenset[str] | None = frozenset({Smoothing.kind})
    integer: bool = True
    dynamic: bool = False
    kernel_dims: frozenset[int] = frozenset({0, 2})
    transposed: bool = False
    channel_groups: bool = True
    grouped_convolutions: bool = False
    grouped_both: bool = False
    bits_by_row: bool = False
    most_products: int = INT32_PRODUCTS

    def support(self, module: Layer) -> bool:
        """Whether a layer is among them."""
        layer, shape = module.format, module.weight_shape
        split = any(grid is not None and len(grid.groups) > 1 for grid in (layer.weight, layer.input))
        grouped = getattr(module, "groups", 1) > 1
        return (
            (layer.input is not None) == self.integer
            and (self.dynamic or not isinstance(layer.input, DynamicFormat))
            and (self.transforms is None or {transform.kind for transform in layer.transforms} <= self.transforms)
            and len(shape) - 2 in self.kernel_dims
            and (self.transposed or not getattr(module, "transposed", False))
            and (self.channel_groups or not split)
            and (self.grouped_convolutions or not grouped)
            and (self.grouped_both or not (grouped and split))
            and (self.bits_by_row or layer.input is None or not layer.input.by_row)
            and math.prod(shape[1:]) <= self.most_products
        )


class Kernel(nn.Module):
    """Executes one layer: ``forward(x, row) -> y``. x is float [B, ...]; row is the clock's, int64 [] or [B].

    A kernel never changes once it is built, so copies of a model share it; a layer that moves to another device gets
    another. Whatever a kernel registers as a buffer is put on the layer's device before it first runs.

    Attributes:
        capabilities: which layers it executes.
        fuses: whether it takes what is before and after a convolution with it, as ``runtime/native/blocks.py`` needs.
    """

    capabilities: ClassVar[Capabilities] = Capabilities()
    fuses: ClassVar[bool] = False

    @classmethod
    def supports(cls, module: Layer) -> bool:
        """Whether the kernel executes a layer."""
        return cls.capabilities.support(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernel:
        return self


def opaque(function: FunctionT) -> FunctionT:
    """Let torch.compile call `function` without tracing it: kernels pass addresses of tensors to other code."""
    untraced = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return untraced(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return cast(FunctionT, call)
