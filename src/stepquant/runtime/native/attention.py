"""Attention in integers: products of the codes of query and key, and of probabilities and value."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from stepquant.core.dynamic import DynamicGrid
from stepquant.core.qtensor import Grid
from stepquant.errors import StepquantError
from stepquant.layers.attention import AttentionKernel, QuantizedAttentionProcessor
from stepquant.layers.clock import of_samples
from stepquant.layers.format import OPERANDS
from stepquant.layers.kernel import opaque
from stepquant.layers.scaled_dot_product import additive_mask
from stepquant.runtime.native.build import INSTRUCTION_SETS, available, library
from stepquant.runtime.native.library import TYPES, Attention, Heads, OperandGrid, no_memory
from stepquant.runtime.native.recording import record
from stepquant.runtime.native.tables import rows_of, table_row

MOST_PRODUCTS = (1 << 31) // (255 * 255)
"""Products of two codes that an accumulator holds in the worst case."""


class NativeAttention(AttentionKernel):
    """``Q(softmax(Q(query) Q(key)^T / sqrt(d) + mask)) Q(value)``.

    With dynamic grids the scales of value's tokens are factors of the probabilities, as in `ScaledDotProduct`.

    An output row is NaN if a NaN is in its query, in a key or value of its head, or in its row of the mask.

    Args:
        instructions: one of the available `INSTRUCTION_SETS`; by default the fastest.
    """

    def __init__(self, processor: QuantizedAttentionProcessor, *, instructions: str | None = None) -> None:
        super().__init__()
        self.library = library(instructions)
        self.extension = INSTRUCTION_SETS[instructions or available()[0]].code
        attention = processor.attention()
        self.columns = [_columns(getattr(attention, name)) for name in OPERANDS]
        self.by_row = self.lasting = [column for columns in self.columns for column in columns]

    def fits(self, query: Tensor, key: Tensor) -> bool:
        """Whether neither an accumulator nor the difference of two scores can overflow."""
        return max(2 * query.shape[-1], key.shape[-2]) <= MOST_PRODUCTS

    @opaque
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, row: Tensor, scale: float | None = None
    ) -> Tensor:
        """Attend.

        Args:
            query: float [B, heads, N, d].
            key, value: float [B or 1, heads / g, M, d]; query head h attends to head h // g of them.
            mask: boolean (True: attend) or additive, broadcastable to [B, heads, N, M].
            row: row of the activation tables, int64 [] or [B].
            scale: factor of the scores, 1 / sqrt(d) by default.

        Returns:
            float [B, heads, N, d], a view of [B, N, heads, d].

        Raises:
            StepquantError: if the operands do not fit each other, are not in main memory, or memory is not sufficient.
        """
        batch, heads, length, size = query.shape
        fits = key.shape == value.shape and heads % key.shape[1] == 0 and key.shape[3] == size
        fits = fits and len(key) in (1, batch)
        if not fits or not all(x is None or x.is_cpu for x in (query, key, value, mask)):
            raise StepquantError(
                f"attention was given {_described(query)}, {_described(key)} and {_described(value)}; expected query, "
                "key and value of the same samples, heads and channels, on cpu like the mask."
            )
        if len(key) != batch:
            key, value = key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
        dtype = query.dtype
        query, key, value = (_adjacent(x) for x in (query, key, value))
        keep = [self._grid(index, row, batch) for index in range(4)]
        grids = (OperandGrid * 4)(*(grid for grid, _ in keep))
        y = torch.empty(batch, length, heads, size, dtype=query.dtype, device="cpu")
        strides = (0, 0, 0)
        factor = size**-0.5 if scale is None else scale
        if mask is not None:
            scores = (batch, heads, length, key.shape[2])
            mask = additive_mask(mask, scores).float().expand(scores)
            mask = mask if mask.stride(3) == 1 else mask.contiguous()
            strides = (mask.stride(0), mask.stride(1), mask.stride(2))
        attention = Attention(
            *(Heads(x.data_ptr(), TYPES[x.dtype], x.stride(0), x.stride(2), x.stride(1)) for x in (query, key, value)),
            grids, None if mask is None else mask.data_ptr(), *strides,
            y.data_ptr(), TYPES[y.dtype], y.stride(0), y.stride(1), y.stride(2),
            batch, heads, length, key.shape[2], size, key.shape[1], factor, self.extension, torch.get_num_threads(),
        )  # fmt: skip
        if self.library.sq_attention(byref(attention)):
            raise no_memory()
        record(attention)
        return y.to(dtype).transpose(1, 2)

    def _grid(self, index: int, row: Tensor, batch: int) -> tuple[OperandGrid, list[Tensor]]:  # type: ignore[valid-type]
        """The grid of an operand at a row, and the tensors that it points into."""
        columns, per_sample = self.columns[index], 0
        rows = len(columns[0])
        if rows > 1 and row.dim():
            columns, per_sample = [rows_of(column, of_samples(row, batch)) for column in columns], 1
        at = 0 if per_sample else 4 * table_row(row, rows)
        top, *tables = (column.data_ptr() + at for column in columns)
        return OperandGrid(*(tables or (None, None)), top, per_sample), columns


def _columns(grid: Grid | DynamicGrid) -> list[Tensor]:
    """The largest code, int32 [R], and of a stored grid scale and zero point, each [R, 1, 1]."""
    return [grid.tops, *([grid.scale, grid.zero_point.int()] if isinstance(grid, Grid) else [])]


def _described(x: Tensor) -> str:
    return f"{list(x.shape)} on {x.device}"


def _adjacent(x: Tensor) -> Tensor:
    """x of a dtype that the kernels read, with the last dimension contiguous."""
    if x.dtype not in TYPES:
        x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()
