"""Quantizing on another device, in a process of its own: a device that is pretended is so for all that comes after."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_quantizing_on_a_pretended_device():
    path = Path(__file__).with_name("device_in_a_process.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-4000:]
