"""Whether Triton's kernels run here: on a GPU, or for tests in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os

import torch

OLDEST = (8, 0)
"""Compute capability of the first GPUs (Ampere) that Triton compiles integer products for."""


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, one program after the other, in numpy (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def supported() -> str | None:
    """None if this machine runs the kernels; else the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'stepquant[cuda]', on Linux)"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no GPU here, or this build of torch is for CPUs only"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        version, oldest = (".".join(str(part) for part in parts) for parts in (capability, OLDEST))
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {version}, and Triton's integer products begin with {oldest}"
    return None
