"""Steps on a GPU: timing by CUDA events, CUDA graphs, and the bytes of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.bench.peers import Candidate
from stepquant.errors import StepquantError
from stepquant.runtime import cuda

WARM_UP = 3
"""Steps before a graph is captured: the first ones choose tile sizes and load libraries."""


def check_gpu() -> None:
    """Raise `StepquantError` if there is no GPU that the kernels support."""
    reason = "no GPU is available" if not torch.cuda.is_available() else cuda.supported()
    if reason is not None:
        raise StepquantError(f"`device=cuda` cannot be used: {reason}. Use `device=cpu`.")


def event_seconds(run: Callable[[], object]) -> float:
    """Duration of `run` on the GPU, between two events in its queue."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(model: Any, arguments: dict[str, Tensor]) -> Candidate:
    """A step as a CUDA graph; each replay reads the timestep from its tensor."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            model(**arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(**arguments)
    return graph.replay


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers on its device, including those of kernels; each storage counts once."""
    device = next(model.parameters()).device
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.device == device}.values())
