"""Quantize on a simulated GPU, in a separate process: registering its backend affects the whole process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_quantizing_on_a_simulated_gpu():
    path = Path(__file__).with_name("device_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-4000:]
