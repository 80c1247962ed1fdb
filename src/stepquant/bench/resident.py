"""Resident memory of a network that a separate process loads and runs for one step, beyond that of an empty process.

The process is ``python -m stepquant.bench.resident FOLDER THREADS MEMORY``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
from pydantic import BaseModel
from safetensors.torch import save_file
from torch import nn

from stepquant.calibration.saved_values import load_values, save_values
from stepquant.checkpoint.format import WEIGHTS
from stepquant.checkpoint.read import load_denoiser
from stepquant.checkpoint.write import narrow_tensors
from stepquant.layers.install import made_by_quantization
from stepquant.layers.quantized import quantized_modules
from stepquant.memory import peak_resident_bytes, resident_bytes, run_in_process
from stepquant.runtime import prepare

ARGUMENTS = "arguments.safetensors"


class Resident(BaseModel):
    """Memory of one network.

    Attributes:
        held: bytes after a step; memory-mapped files have been read by then.
        peak: largest number of bytes while it was loaded and run.
    """

    name: str
    held: int
    peak: int


def measure_resident(name: str, model: nn.Module, step: dict[str, Any], memory: str = "unpacked") -> Resident:
    """Measure a denoiser, quantized or not; a temporary folder passes its weights to the other process.

    Args:
        step: arguments of the denoiser in one step.

    Raises:
        StepquantError: if that process fails.
    """
    saved: Any = model
    with tempfile.TemporaryDirectory(prefix="stepquant-") as folder:
        saved.save_config(folder)
        tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
        if quantized_modules(model):
            tensors = narrow_tensors(tensors, made_by_quantization(model))
        save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt"})
        save_values(step, Path(folder) / ARGUMENTS)
        arguments = [folder, str(torch.get_num_threads()), memory]
        output = run_in_process(__name__, arguments, name)
    return Resident(name=name, **json.loads(output.splitlines()[-1]))


@torch.no_grad()
def main(folder: str, threads: str, memory: str) -> None:
    """Load and run the network in `folder` twice; print the bytes as JSON.

    The first time also brings code of libraries and their workspaces into memory.
    """
    torch.set_num_threads(int(threads))
    empty = _settled_bytes()
    _load_and_run(Path(folder), memory)
    peak = peak_resident_bytes() - empty
    empty = _settled_bytes()
    model = _load_and_run(Path(folder), memory)
    print(json.dumps({"held": _settled_bytes() - empty, "peak": peak}))
    del model


def _load_and_run(folder: Path, memory: str) -> nn.Module:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model: Any
    if "quantization_config" in config:
        model = load_denoiser(folder)
        prepare(model, "auto", memory)
    else:
        model = getattr(diffusers, config["_class_name"]).from_pretrained(folder).eval()
    model(**load_values(folder / ARGUMENTS))
    return model


def _settled_bytes() -> int:
    """Resident bytes after the allocator has returned free memory."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return resident_bytes()


if __name__ == "__main__":
    main(*sys.argv[1:])
