"""Grids and transforms as buffers of modules, named as in checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, overload

import torch
from torch import Tensor, nn

from stepquant.core.dynamic import DynamicFormat, DynamicGrid
from stepquant.core.qtensor import Grid, GridFormat
from stepquant.core.transforms import LayerTransform

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def register_grid(module: nn.Module, name: str, grid_format: GridFormat | DynamicFormat, outputs: int = 1) -> None:
    """Register an empty grid as the buffers ``{name}_scale`` and ``{name}_zero_point``, which a dynamic one lacks.

    If rows differ in bits, there is ``{name}_bits`` as well, see `Grid`.
    """
    # Explicit dtypes, since a model may be built under another default dtype.
    if grid_format.by_row:
        module.register_buffer(f"{name}_bits", torch.full((grid_format.rows,), grid_format.bits, dtype=torch.uint8))
    if isinstance(grid_format, DynamicFormat):
        return
    shape = grid_format.shape(outputs)
    module.register_buffer(f"{name}_scale", torch.ones(shape, dtype=torch.float32))
    module.register_buffer(f"{name}_zero_point", torch.zeros(shape, dtype=torch.uint8))


def fill_grid(module: nn.Module, name: str, grid: Grid | DynamicGrid) -> None:
    """Copy `grid` into the buffers of `register_grid`."""
    if grid.row_bits is not None:
        setattr(module, f"{name}_bits", grid.row_bits.clone())
    if isinstance(grid, DynamicGrid):
        return
    setattr(module, f"{name}_scale", grid.scale.clone())
    setattr(module, f"{name}_zero_point", grid.zero_point.clone())


@overload
def read_grid(module: nn.Module, name: str, grid_format: GridFormat) -> Grid: ...
@overload
def read_grid(module: nn.Module, name: str, grid_format: GridFormat | DynamicFormat) -> Grid | DynamicGrid: ...
def read_grid(module: nn.Module, name: str, grid_format: GridFormat | DynamicFormat) -> Grid | DynamicGrid:
    """The grid in the buffers of `register_grid`, neither checked nor copied."""
    row_bits = getattr(module, f"{name}_bits") if grid_format.by_row else None
    if isinstance(grid_format, DynamicFormat):
        return DynamicGrid(grid_format.bits, grid_format.group, row_bits)
    scale, zero_point = getattr(module, f"{name}_scale"), getattr(module, f"{name}_zero_point")
    return Grid(scale, zero_point, grid_format.bits, grid_format.groups, row_bits)


class TransformBuffers(nn.Module):
    """Tensors of one `LayerTransform` as buffers, which are not persistent in kernels."""

    def __init__(self, transform: LayerTransform, *, persistent: bool = True) -> None:
        super().__init__()
        self.kind = type(transform)
        for name, tensor in transform.tensors().items():
            self.register_buffer(name, tensor, persistent)

    def fill(self, transform: LayerTransform) -> None:
        """Copy the tensors of a transform of the same kind."""
        for name, tensor in transform.tensors().items():
            setattr(self, name, tensor.clone())

    def transform(self) -> LayerTransform:
        """The transform, neither checked nor copied."""
        return self.kind(**dict(self.named_buffers()))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TransformBuffers:
        return keep_dtypes(self, lambda: super(TransformBuffers, self)._apply(fn, recurse))


def has_buffers_of(module: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> bool:
    """Whether a state dict has a buffer of this module itself; that of an adapter has none."""
    return any(f"{prefix}{name}" in state_dict for name, _ in module.named_buffers(recurse=False))


def keep_dtypes(module: ModuleT, apply: Callable[[], ModuleT]) -> ModuleT:
    """Run `apply` on a module but restore the dtypes of its buffers: ``model.half()`` must not round scale tables."""
    before = dict(module.named_buffers(recurse=False))
    result = apply()
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.dtype != before[name].dtype:
            setattr(module, name, before[name].to(buffer.device))
    return result
