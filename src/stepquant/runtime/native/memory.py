"""Memory that one thread uses again and again: fresh memory would cost a fault a page."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_BUFFERS = threading.local()


def scratch(name: str, size: int) -> int:
    """Address of at least `size` bytes, this thread's own under `name` until its next call with that name."""
    buffer: Tensor | None = getattr(_BUFFERS, name, None)
    if buffer is None or buffer.numel() < size:
        buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        setattr(_BUFFERS, name, buffer)
    return buffer.data_ptr()
