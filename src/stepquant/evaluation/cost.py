"""What a pipeline costs: bytes on disk and bytes of memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from torch import nn

from stepquant.errors import StepquantError

FLOAT32_BYTES = 4


def folder_bytes(folder: Path) -> int:
    """Bytes of all files of a folder, configuration included."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def float32_bytes(model: nn.Module) -> int:
    """Bytes that the parameters of a full-precision model take in float32."""
    return sum(parameter.numel() for parameter in model.parameters()) * FLOAT32_BYTES


def peak_memory_bytes(model: str, batch_size: int, backend: str = "auto", memory: str = "unpacked") -> int:
    """Highest resident memory of a fresh process that loads `model` and draws one batch for two steps.

    A process of its own, because in this one the other pipeline and everything drawn so far would count too.

    Raises:
        StepquantError: if that process fails.
    """
    command = [sys.executable, "-m", "stepquant.evaluation.memory", model, str(batch_size), backend, memory]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise StepquantError(f"the memory of {model} could not be measured: {reason}")
    return int(process.stdout.split()[-1])


def own_peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    # Not getrusage: on Linux its maximum survives exec, so a child would report its parent's memory.
    own = _from_status("VmHWM")
    if own is not None:
        return own
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def own_bytes() -> int:
    """Resident memory of this process now, on Linux; elsewhere the highest so far."""
    own = _from_status("VmRSS")
    return own_peak_bytes() if own is None else own


def _from_status(entry: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{entry}:"))
    return int(line.split()[1]) * 1024
