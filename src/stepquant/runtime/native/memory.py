"""Memory that a thread reuses: fresh memory would cost a page fault for each page."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from stepquant.runtime.native.library import no_memory

_BUFFERS = threading.local()


def scratch(name: str, size: int) -> int:
    """The address of `size` bytes, which are this thread's until it calls again with the same `name`.

    Raises:
        StepquantError: if there is not enough memory.
    """
    buffer: Tensor | None = getattr(_BUFFERS, name, None)
    if buffer is None or buffer.numel() < size:
        try:
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        except RuntimeError:
            raise no_memory() from None
        setattr(_BUFFERS, name, buffer)
    return buffer.data_ptr()
