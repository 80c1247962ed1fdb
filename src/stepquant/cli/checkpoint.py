"""The way from a model to a new checkpoint, which the same command continues or completes after an interruption."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from typing import Any

import typer

from stepquant.cli.output import check_space, check_writable_folder, workspace_of

MARK = "finished"
"""File in a workspace, written just before the result: a digest of the command's arguments and the provenance."""


def write_checkpoint(
    quantize: Callable[[Any, Path], Any],
    model: str,
    out: Path,
    *,
    arguments: dict[str, str],
    overwrite: bool,
    done: str,
    dtype: str = "float32",
    disk_factor: int = 1,
) -> float | None:
    """Load `model`, quantize it and write it to `out`; returns the seconds it took, None if it was done before.

    Args:
        quantize: called with the pipeline and the folder where finished stages are kept; returns the quantized one.
        arguments: of the command: a result of the same arguments is not made again.
        done: the message at the end.
        disk_factor: free space needed, relative to all weights.
    """
    import torch

    from stepquant.checkpoint import check_out
    from stepquant.loading import resolve_pipeline
    from stepquant.planning import duration
    from stepquant.saving import save

    workspace, seconds = workspace_of(out), None
    if not is_finished(workspace, out, arguments):
        check_out(out, overwrite=overwrite)
        check_writable_folder(out.parent)
        pipeline = resolve_pipeline(model, dtype=getattr(torch, dtype))
        # The weights as loaded take more than the checkpoint and the finished stages together.
        check_space(out.parent, disk_factor * parameter_bytes(pipeline))
        start = time.perf_counter()
        quantized = quantize(pipeline, workspace)
        mark_finished(workspace, arguments, quantized)
        save(quantized, out, overwrite=overwrite)
        seconds = time.perf_counter() - start
        done += f" in {duration(seconds)}"
    # The time is printed and never in the checkpoint, whose bytes depend on the arguments alone.
    typer.echo(f"{done}: {out}")
    clear(workspace)
    return seconds


def parameter_bytes(pipeline: Any) -> int:
    """Bytes of all weights of a pipeline."""
    models = [part for part in pipeline.components.values() if hasattr(part, "parameters")]
    return sum(weight.numel() * weight.element_size() for model in models for weight in model.parameters())


def mark_finished(workspace: Path, arguments: dict[str, str], pipeline: Any) -> None:
    """Record the result that is about to be written; only the main process does."""
    from stepquant.distributed import Ranks
    from stepquant.files import digest, write_atomic
    from stepquant.models import denoiser_name

    if not Ranks.current().is_main:
        return
    provenance = getattr(pipeline, denoiser_name(pipeline)).config["quantization_config"]["provenance"]
    write_atomic(workspace / MARK, lambda draft: draft.write_text(digest([arguments, provenance])))


def is_finished(workspace: Path, out: Path, arguments: dict[str, str]) -> bool:
    """Whether the same command wrote `out` and was killed before it removed its workspace."""
    from stepquant.checkpoint import is_checkpoint, read_manifest
    from stepquant.files import digest

    try:
        mark = (workspace / MARK).read_text()
    except OSError:
        return False
    return is_checkpoint(out) and mark == digest([arguments, read_manifest(out).provenance])


def clear(workspace: Path) -> None:
    """Remove a workspace; only the main process does.

    The mark goes last, so that the same command recognizes its result until then.
    """
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
