"""Memory of kernels: what a thread reuses, and where the addresses of a recording point."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.runtime.native.library import no_memory

_BUFFERS = threading.local()
"""Fresh memory would cost a page fault for each page."""


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


NOWHERE, CODES, ARENA, FIRST = 0, 1, 2, 3
"""Slots of memory: absolute addresses, in tensors that the recording keeps alive; codes of one layer; intermediate
tensors; then inputs and outputs."""


@dataclass
class Memory:
    """Bytes [start, stop) that the block allocated before step `born` and that step `last` is the last to use."""

    start: int
    stop: int
    tensor: Tensor
    born: int
    last: int = -1
    slot: int = ARENA
    offset: int = 0


def aligned(size: int) -> int:
    """`size` rounded up to 64 bytes."""
    return (size + 63) // 64 * 64


def lay_out(memories: list[Memory]) -> int:
    """Assign offsets, first fit in order of birth, so that no two overlap that are in use together; the total bytes."""
    total, live = 0, list[Memory]()
    for memory in sorted(memories, key=lambda memory: memory.born):
        live = [other for other in live if other.last >= memory.born]
        size, offset = memory.stop - memory.start, 0
        for other in sorted(live, key=lambda other: other.offset):
            if offset + size <= other.offset:
                break
            offset = max(offset, aligned(other.offset + other.stop - other.start))
        memory.offset = offset
        live.append(memory)
        total = max(total, offset + size)
    return total
