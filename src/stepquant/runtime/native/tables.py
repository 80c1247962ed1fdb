"""Rows of activation tables, checked before a kernel reads at their address."""

from __future__ import annotations

from torch import Tensor

from stepquant.errors import StepquantError


def table_row(row: Tensor, rows: int) -> int:
    """The row that a table of `rows` rows has for the clock's row, int64 [].

    Raises:
        StepquantError: if the table has fewer rows.
    """
    return 0 if rows == 1 else check_row(int(row), rows)


def check_row(row: int, rows: int) -> int:
    """Return `row` if it is one of `rows` rows, else raise `StepquantError`."""
    if not 0 <= row < rows:
        raise StepquantError(f"the clock is at row {row}; expected one of the {rows} rows of the activation table.")
    return row


def rows_of(table: Tensor, rows: Tensor) -> Tensor:
    """``table[rows]``: [R, ...] and int64 [B] -> [B, ...], contiguous.

    Raises:
        StepquantError: if the table has fewer rows.
    """
    try:
        return table.index_select(0, rows)
    except (IndexError, RuntimeError):
        check_row(int(rows.min()), len(table))
        check_row(int(rows.max()), len(table))
        raise
