"""What commands print and write, and checks of the places they write to, made before long work begins."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from stepquant.cli.progress import RichProgress
from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.files import cannot_write, write_text
from stepquant.progress import Progress

WIDTH = 160
"""Columns of a table that is written to a file or a pipe."""


def progress() -> Progress:
    """Progress bars on standard error, which leaves standard output to results; silent in all but the main process."""
    return RichProgress(Console(stderr=True)) if Ranks.current().is_main else Progress()


@contextmanager
def only_main_prints(ranks: Ranks) -> Iterator[None]:
    """Discard the standard output of all processes but the main one."""
    if ranks.is_main:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):  # noqa: PTH123 - not a file
        yield


def print_table(table: Table) -> None:
    """Print a table to standard output; wide instead of folded where that is not a terminal."""
    console = Console()
    (console if console.is_terminal else Console(width=WIDTH)).print(table)


def table_of(title: str, names: Sequence[str], numbers: Sequence[str] = ()) -> Table:
    """An empty table: columns of text, the first of which folds, then right-aligned columns of numbers."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    for index, name in enumerate(names):
        table.add_column(name, overflow="ellipsis" if index else "fold")
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def write_json(path: Path, figures: BaseModel | dict[str, Any]) -> None:
    """Write figures to a JSON file, whole or not at all."""
    text = figures.model_dump_json(indent=2) if isinstance(figures, BaseModel) else json.dumps(figures, indent=2)
    write_text(path, text + "\n")


def workspace_of(out: Path) -> Path:
    """The hidden folder beside `out` where a run keeps its finished stages."""
    if out.name in ("", ".."):
        raise StepquantError(f"out is {str(out)!r}; expected the name of a new folder, such as out/model.")
    return out.with_name(f".{out.name}.work")


def check_writable_file(path: Path | None) -> None:
    """Raise `StepquantError` unless a file can be written at `path`; create its folder."""
    if path is None:
        return
    if path.is_dir():
        raise StepquantError(f"cannot write {path}: it is a folder. Give a file name.")
    check_writable_folder(path.parent)


def check_page(out: Path, folders: Sequence[Path]) -> None:
    """Raise `StepquantError` unless a page about the checkpoints in `folders` can be written at `out`."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise StepquantError(f"the page cannot be written to {out}; expected a file name that ends in .html.")
    for folder in folders:
        if folder.resolve() in out.resolve().parents[1:]:
            raise StepquantError(f"{out} lies inside the checkpoint, which must not change. Choose another folder.")
    check_writable_file(out)


def check_writable_folder(folder: Path) -> None:
    """Raise `StepquantError` unless files can be written in `folder`; create the folder."""
    probe = folder / ".stepquant-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A file is really written: permissions neither reveal a read-only disk nor restrict the administrator.
        probe.write_bytes(b"")
    except OSError as error:
        raise cannot_write(folder, error) from None
    finally:
        if folder.is_dir():
            probe.unlink(missing_ok=True)


def check_space(folder: Path, needed: int) -> None:
    """Raise `StepquantError` unless the disk that holds `folder` has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StepquantError(
            f"not enough disk space in {folder}: {free / 1e6:.1f} MB are free; expected about {needed / 1e6:.1f} MB. "
            "Free some space or choose another folder."
        )
