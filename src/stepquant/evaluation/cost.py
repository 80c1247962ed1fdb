"""Cost of a pipeline: bytes on disk and bytes of memory."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from stepquant.memory import run_in_process

FLOAT32_BYTES = 4


def folder_bytes(folder: Path) -> int:
    """Size of all files of a folder, configuration included."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def float32_bytes(model: nn.Module) -> int:
    """Size of a model's parameters in float32."""
    return sum(parameter.numel() for parameter in model.parameters()) * FLOAT32_BYTES


def peak_memory_bytes(model: str, batch_size: int, backend: str = "auto", memory: str = "unpacked") -> int:
    """Highest resident memory of a fresh process that loads `model` and generates one batch in two steps.

    A separate process, because this one holds the other pipeline and all images generated so far.

    Raises:
        StepquantError: if that process fails.
    """
    arguments = [model, str(batch_size), backend, memory]
    return int(run_in_process("stepquant.evaluation.memory", arguments, model).split()[-1])
