"""Availability of Triton kernels: on a GPU, or for tests in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import torch

OLDEST = (8, 0)
"""Minimum compute capability (Ampere) for which Triton compiles integer products."""


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def supported() -> str | None:
    """Return None if this machine runs the kernels, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'stepquant[cuda]', on Linux)"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no GPU is available, or this build of torch is for CPUs only"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        version, oldest = (".".join(str(part) for part in parts) for parts in (capability, OLDEST))
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {version}, and Triton's integer products begin with {oldest}"
    return None
