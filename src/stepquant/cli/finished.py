"""A run that is killed between writing its result and removing its workspace is finished by the same command."""

from __future__ import annotations

from pathlib import Path
from shutil import rmtree
from typing import Any

MARK = "finished"
"""File in a workspace: the result is about to be written. It holds a digest of what was asked and what was made."""


def mark_finished(workspace: Path, asked: dict[str, str], pipeline: Any) -> None:
    """Say what the result will be, before it is written; of several processes the main one does.

    Args:
        asked: the command's arguments.
        pipeline: the result.
    """
    from stepquant.distributed import Ranks
    from stepquant.files import digest, write_atomic
    from stepquant.models import denoiser_name

    if not Ranks.current().is_main:
        return
    provenance = getattr(pipeline, denoiser_name(pipeline)).config["quantization_config"]["provenance"]
    write_atomic(workspace / MARK, lambda draft: draft.write_text(digest([asked, provenance])))


def is_finished(workspace: Path, out: Path, asked: dict[str, str]) -> bool:
    """Whether a run of this very command wrote `out`, and was killed before it had removed its workspace."""
    from stepquant.checkpoint import is_checkpoint, read_manifest
    from stepquant.files import digest

    try:
        finished = (workspace / MARK).read_text()
    except OSError:
        return False
    return is_checkpoint(out) and finished == digest([asked, read_manifest(out).provenance])


def clear(workspace: Path) -> None:
    """Remove a workspace, the mark last: until then the same command finds its own result. The main process does."""
    from stepquant.distributed import Ranks

    if not Ranks.current().is_main:
        return
    try:
        entries = list(workspace.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.is_dir():
            rmtree(entry, ignore_errors=True)
        elif entry.name != MARK:
            entry.unlink(missing_ok=True)
    rmtree(workspace, ignore_errors=True)
