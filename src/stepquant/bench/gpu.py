"""A step on a GPU: contestants in bfloat16, timed by the device's own events, and the bytes that their weights take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.bench.peers import Contestant
from stepquant.errors import StepquantError
from stepquant.runtime import cuda

WARM_UP = 3
"""Steps before a graph is captured: tiles are chosen and libraries loaded in the first."""


def check_gpu() -> None:
    """Raise `StepquantError` where there is no GPU with kernels."""
    reason = "there is no GPU here" if not torch.cuda.is_available() else cuda.supported()
    if reason is not None:
        raise StepquantError(f"--device cuda cannot run: {reason}; use --device cpu.")


def event_seconds(run: Callable[[], object]) -> float:
    """What `run` takes on the device, from one event in its queue to the next."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(model: Any, arguments: dict[str, Tensor]) -> Contestant:
    """A step as a CUDA graph; the timestep is read from its tensor each time it runs."""
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
    """Bytes that the parameters and buffers of a model take on the device it is on, kernels' included, each once."""
    device = next(model.parameters()).device
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.device == device}.values())
