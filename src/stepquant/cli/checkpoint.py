"""The way from a model to a new checkpoint, which the same command continues or completes after an interruption."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from typing import Any

import typer

from stepquant.cli.options import inputs_from, origin_from, pairs_from, prompts_from, settings_from
from stepquant.cli.output import (
    check_space,
    check_writable_file,
    check_writable_folder,
    progress,
    workspace_of,
    write_json,
)
from stepquant.progress import Stopwatch

MARK = "finished"
"""File in a workspace, written just before the result: a digest of the command's arguments and the provenance."""

CALIBRATION = ("samples", "steps", "trajectories", "size")
"""Options that are attributes of a `Calibration`."""


def write_checkpoint(
    quantize: Callable[..., Any],
    settings: Any,
    options: dict[str, Any],
    *,
    disk_factor: int = 1,
    move_to: str | None = None,
    **keywords: Any,
) -> None:
    """Load a model, quantize it and write the result.

    Args:
        quantize: `stepquant.quantize` or `stepquant.train`.
        settings: the recipe's class, whose fields ``--set`` names.
        options: name -> value of the command's options.
        disk_factor: free space needed, relative to all weights.
        move_to: device of the whole pipeline.
        keywords: of `quantize`, beside those that both functions take.
    """
    from stepquant.calibration.placement import check_device
    from stepquant.checkpoint import check_out
    from stepquant.loading import resolve_pipeline
    from stepquant.planning import duration
    from stepquant.saving import save

    model, out, overwrite, times = (options[name] for name in ("model", "out", "overwrite", "times"))
    arguments = {name: str(value) for name, value in options.items() if name not in ("overwrite", "times")}
    keywords |= _keywords(options, settings)
    done = f"{model} quantized to {_bits(keywords['spec'])} with {settings.called()}"
    workspace = workspace_of(out)
    if not is_finished(workspace, out, arguments):
        check_out(out, overwrite=overwrite)
        check_writable_folder(out.parent)
        check_writable_file(times)
        pipeline = resolve_pipeline(model, dtype=options["dtype"].torch, **origin_from(options))
        # The weights as loaded take more than the checkpoint and the finished stages together.
        check_space(out.parent, disk_factor * _parameter_bytes(pipeline))
        if move_to is not None:
            pipeline.to(check_device(move_to))
        start, stopwatch = time.perf_counter(), Stopwatch(progress())
        quantized = quantize(pipeline, workspace=workspace, progress=stopwatch, **keywords)
        mark_finished(workspace, arguments, quantized)
        save(quantized, out, overwrite=overwrite)
        seconds = time.perf_counter() - start
        if times is not None:
            _write_times(times, out, seconds, stopwatch)
        # Durations are not in the checkpoint, whose bytes depend on the arguments alone.
        done += f" in {duration(seconds)}"
    typer.echo(f"{done}: {out}")
    _print_check(out)
    clear(workspace)


def _print_check(out: Path) -> None:
    """Print what the check found, which the provenance holds."""
    from stepquant.checkpoint import read_manifest

    found = read_manifest(out).provenance.get("check")
    if found:
        typer.echo(f"check: {found['summary']}")


def _keywords(options: dict[str, Any], settings: Any) -> dict[str, Any]:
    """Arguments that `stepquant.quantize` and `stepquant.train` share."""
    from stepquant.config import QuantSpec

    spec = {name: options[name] for name in ("bits", "exact_time", "smoothing", "group_size")}
    spec["overrides"] = pairs_from(options["override"], "REGEX=BITS, such as mid_block=w8a8")
    steps = pairs_from(options.get("step_bits"), "START-STOP=BITS, such as 0.8-1=8")
    spec["step_bits"] = {name: int(bits) if bits.isdigit() else bits for name, bits in steps.items()}
    if options.get("activations") is not None:  # training has static ones only
        spec["activations"] = options["activations"].value
    components = pairs_from(options["component"], "NAME=BITS, such as transformer_2=w4a8")
    specs = {name: QuantSpec.parse(spec | {"bits": bits}) for name, bits in components.items()}
    return {
        "spec": specs or QuantSpec.parse(spec),
        "hyperparameters": settings_from(options["set_"], settings),
        "effort": options["effort"].value,
        "calibration": {name: options[name] for name in CALIBRATION if options[name] is not None},
        "prompts": prompts_from(options["prompts"]),
        "guidance": options["guidance"],
        "inputs": inputs_from(options["inputs"]),
        "budget": options["budget"],
        "correction": options["correct"],
        "also": pairs_from(options["also"], "NAME=BITS, such as text_encoder=w8a16"),
        "seed": options["seed"],
        "check": options["check"],
        "on_low_quality": options["on_low_quality"].value,
        "source": options["model"],
    }


def _bits(spec: Any) -> str:
    return ", ".join(f"{bits} ({name})" for name, bits in spec.items()) if isinstance(spec, dict) else str(spec)


def _parameter_bytes(pipeline: Any) -> int:
    models = [part for part in pipeline.components.values() if hasattr(part, "parameters")]
    return sum(weight.numel() * weight.element_size() for model in models for weight in model.parameters())


def _write_times(path: Path, out: Path, seconds: float, stopwatch: Stopwatch) -> None:
    import torch

    from stepquant.distributed import Ranks
    from stepquant.report.inputs import Times

    if Ranks.current().is_main:
        stages = {name: round(value, 1) for name, value in stopwatch.seconds.items()}
        threads = torch.get_num_threads()
        write_json(path, Times(out=out.resolve().name, seconds=round(seconds, 1), stages=stages, threads=threads))


def mark_finished(workspace: Path, arguments: dict[str, str], pipeline: Any) -> None:
    """Record the result that is about to be written; only the main process does."""
    from stepquant.distributed import Ranks
    from stepquant.files import digest, write_text
    from stepquant.models.denoisers import quantized_denoisers
    from stepquant.saving import provenance_of

    if Ranks.current().is_main:
        provenance = provenance_of(next(iter(quantized_denoisers(pipeline).values())))
        write_text(workspace / MARK, digest([arguments, provenance]))


def is_finished(workspace: Path, out: Path, arguments: dict[str, str]) -> bool:
    """Whether the same command wrote `out` and was killed before it removed its workspace."""
    from stepquant.checkpoint import is_checkpoint, read_manifest
    from stepquant.files import digest

    try:
        mark = (workspace / MARK).read_text(encoding="utf-8")
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
