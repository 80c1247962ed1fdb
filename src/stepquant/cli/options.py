"""What several commands share: their common options, and checks made before long work begins."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stepquant.cli.progress import RichProgress
from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.files import cannot_write
from stepquant.progress import Progress

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A diffusers folder, a hub id, or zoo:NAME.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0)]
Steps = Annotated[int, typer.Option(help="Denoising steps.")]
Backend = Annotated[
    str, typer.Option(help="What runs a quantized model: auto, native, onednn, cuda, reference, or path.py:function.")
]
Memory = Annotated[
    str, typer.Option(help="How weights of up to 4 bits are held: unpacked, or packed: half of it, a seventh slower.")
]
Guidance = Annotated[float | None, typer.Option(help="Scale of classifier-free guidance; default: the model's own.")]
Prompts = Annotated[Path | None, typer.Option(help="File with a prompt a line; default: the model's own prompts.")]

WIDTH = 160
MEGABYTE = 1_000_000


def progress() -> Progress:
    """Progress on standard error, so that standard output holds results alone; of several processes the main one's."""
    return RichProgress(Console(stderr=True)) if Ranks.current().is_main else Progress()


def console() -> Console:
    """Standard output for tables; into a file or a pipe they are written wide, not folded."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=WIDTH)


def at_least_one(name: str, value: int) -> None:
    """Raise `StepquantError` unless `value` is a count of something."""
    if value < 1:
        raise StepquantError(f"{name} is {value}: expected at least 1.")


def pairs_from(given: Sequence[str] | None, what: str, form: str) -> dict[str, str]:
    """``["mid_block=w8a8"]`` -> ``{"mid_block": "w8a8"}``; what stands before may hold ``=`` itself.

    Args:
        what, form: of the option, for the sentence that says what is wrong.
    """
    pairs = {}
    for text in given or ():
        name, equals, bits = text.rpartition("=")
        if not equals or not name:
            raise StepquantError(f"{what} {text!r} is not understood: write it as {form}.")
        pairs[name] = bits
    return pairs


def workspace_of(out: Path) -> Path:
    """The hidden folder beside `out` that a run keeps its finished stages in."""
    if out.name in ("", ".."):
        raise StepquantError(f"out is {str(out)!r}: expected the name of a folder to be made, as in out/model.")
    return out.with_name(f".{out.name}.work")


def check_writable_file(path: Path) -> None:
    """Raise `StepquantError` unless a file can be written at `path`; makes the folder it lies in."""
    if path.is_dir():
        raise StepquantError(f"cannot write {path}: it is a folder; give a file name.")
    check_writable_folder(path.parent)


def check_page(out: Path, folders: Sequence[Path]) -> None:
    """Raise `StepquantError` unless a page about the checkpoints in `folders` can be written at `out`."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise StepquantError(f"the page cannot be written to {out}: expected a file name that ends in .html.")
    for folder in folders:
        if folder.resolve() in out.resolve().parents[1:]:
            raise StepquantError(f"{out} lies inside the checkpoint, which must stay as it is: choose another folder.")
    check_writable_file(out)


def check_writable_folder(folder: Path) -> None:
    """Raise `StepquantError` unless files can be written in `folder`; makes the folder."""
    probe = folder / ".stepquant-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A file is really written: permissions do not tell about read-only disks, nor bind the administrator.
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
            f"not enough disk space in {folder}: about {needed / MEGABYTE:.1f} MB are needed, "
            f"{free / MEGABYTE:.1f} MB are free; make room or choose another folder."
        )
