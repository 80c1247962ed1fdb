"""Resident memory of this process in bytes, and measurements in a separate process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

from stepquant.errors import StepquantError

STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Resident memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Highest resident memory so far."""
    # Not getrusage on Linux: its maximum survives exec, so that a child would report its parent's memory.
    if STATUS.is_file():
        line = next(line for line in STATUS.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return int(memory.peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def run_in_process(module: str, arguments: list[str], name: str) -> str:
    """Return the standard output of ``python -m MODULE ARGUMENTS``, which measures the memory of `name`.

    Raises:
        StepquantError: if the process fails.
    """
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise StepquantError(f"the memory of {name} could not be measured: {reason}")
    return process.stdout
