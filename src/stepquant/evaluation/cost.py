"""Cost of a pipeline: bytes on disk and bytes of memory.

``python -m stepquant.evaluation.cost MODEL BATCH BACKEND MEMORY INPUTS`` prints the peak memory of generation.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from stepquant.calibration.saved_values import load_values, save_values
from stepquant.loading import resolve_pipeline
from stepquant.memory import peak_resident_bytes, run_in_process
from stepquant.pipelines.generate import generate
from stepquant.pipelines.inputs import Inputs
from stepquant.pipelines.request import make_request
from stepquant.runtime import resolve_backend

FLOAT32_BYTES = 4
STEPS = 2
"""The second step includes what stays allocated after the first."""


def folder_bytes(folder: Path) -> int:
    """Size of all files of a folder, configuration included."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def float32_bytes(model: nn.Module) -> int:
    """Size of a model's parameters in float32."""
    return sum(parameter.numel() for parameter in model.parameters()) * FLOAT32_BYTES


def peak_memory_bytes(
    model: str, batch_size: int, inputs: Inputs | None = None, backend: str = "auto", memory: str = "unpacked"
) -> int:
    """Highest resident memory of a fresh process that loads `model` and generates one batch in two steps.

    A separate process, because this one holds the other pipeline and all images generated so far.

    Raises:
        StepquantError: if that process fails.
    """
    with TemporaryDirectory(prefix="stepquant-") as folder:
        path = Path(folder) / "inputs"
        save_values(inputs, path)
        arguments = [model, str(batch_size), backend, memory, str(path)]
        return int(run_in_process(__name__, arguments, model).split()[-1])


def main(model: str, batch_size: str, backend: str, memory: str, inputs: str) -> None:
    """Generate one batch and print the bytes; `inputs` is a file that the calling process wrote."""
    pipeline = resolve_pipeline(model, resolve_backend(backend), memory)
    request = make_request(pipeline, STEPS, inputs=load_values(Path(inputs)))
    generate(pipeline, request, range(int(batch_size)), seed=0)
    print(peak_resident_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
