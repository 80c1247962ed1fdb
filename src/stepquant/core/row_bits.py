"""Bits of an activation that depend on the denoising step: a column of the table that has a row for each step."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from stepquant.core.affine import largest_code
from stepquant.errors import StepquantError

MOST_ROWS = 100_000
"""Maximum rows of a table, beyond the timesteps of any schedule."""

Bits = Annotated[int, Field(ge=2, le=8)]
Rows = Annotated[int, Field(ge=1, le=MOST_ROWS)]


class InvalidGrid(StepquantError):
    """Codes or a grid that violate an invariant, which `what` describes."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}. The checkpoint is damaged; quantize the model again.")
        self.what = what


def column(bits: list[int]) -> tuple[int, Tensor | None]:
    """The bits of all rows as a grid holds them: the most of any, and uint8 [R] if they differ, else None."""
    most = max(bits)
    return most, None if min(bits) == most else torch.tensor(bits, dtype=torch.uint8)


def bits_at(bits: int, row_bits: Tensor | None, row: Tensor) -> int | Tensor:
    """Bits at the clock's row: int if all rows have `bits`, else uint8 of the shape of `row`, [] or [B]."""
    if row_bits is None:
        return bits
    # `[row]` would synchronize with an accelerator and break the graph of torch.compile.
    return row_bits.index_select(0, row.reshape(-1).to(row_bits.device)).reshape(row.shape)


def check_row_bits(what: str, bits: int, row_bits: Tensor | None, rows: int) -> None:
    """Raise `InvalidGrid` unless `row_bits` is uint8 [R], from 2 to `bits`, or None."""
    if row_bits is None:
        return
    if row_bits.dtype != torch.uint8 or tuple(row_bits.shape) != (rows,):
        raise InvalidGrid(f"{what} bits are {row_bits.dtype} {list(row_bits.shape)}; expected uint8 [{rows}]")
    if int(row_bits.min()) < 2 or int(row_bits.max()) > bits:
        raise InvalidGrid(
            f"{what} bits of a row are {int(row_bits.min())} to {int(row_bits.max())}; expected 2 to {bits}"
        )


def tops(bits: int, row_bits: Tensor | None, rows: int) -> Tensor:
    """The largest code of each row: int32 [R]."""
    if row_bits is None:  # on the CPU whatever the default device is, since kernels are given its address
        return torch.full((rows,), largest_code(bits), dtype=torch.int32, device="cpu")
    return largest_code(row_bits)
