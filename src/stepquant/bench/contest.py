"""Who takes part in a benchmark on a device: full precision, the same in integers, and what else runs the network."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepquant.bench.gpu import captured, event_seconds, weight_bytes
from stepquant.bench.measure import wall_seconds
from stepquant.bench.networks import half_arguments, half_network, quantize_network
from stepquant.bench.peers import Contestant, gpu_peers, peers
from stepquant.runtime import fallbacks, prepare

PER_STEP_ROWS = 50


@dataclass
class Contest:
    """Contestants in order, the first of which is what all are compared to.

    Attributes:
        network, per_step: the model in full precision, and in integers with a scale a step.
        seconds_of: runs a contestant and says what it took.
        machine: for people.
        backend: what runs the integers; `fallbacks` are the layers that it cannot.
        left_out: peers that cannot run here -> why.
        weight_bytes: of the networks on a GPU, by type.
    """

    network: Any
    per_step: Any
    arguments: dict[str, Tensor]
    contestants: dict[str, Contestant]
    seconds_of: Callable[[Contestant], float]
    machine: str
    backend: str
    fallbacks: list[str]
    left_out: dict[str, str] = field(default_factory=dict)
    weight_bytes: dict[str, int] = field(default_factory=dict)


def contest(
    network: Any, arguments: dict[str, Tensor], bits: str, *, memory: str, device: str, names: Collection[str]
) -> Contest:
    """The contest of a full-precision network, which is on the CPU, and its integers at `bits` on a device.

    Args:
        names: of `peers.PEERS`, those that take part.
    """
    on_gpu = device == "cuda"
    full = "torch eager bfloat16" if on_gpu else "torch eager float32"
    networks = [network, *(quantize_network(network, arguments, bits, rows) for rows in (PER_STEP_ROWS, 1))]
    if on_gpu:
        networks = [half_network(each, torch.device(device)) for each in networks]
        arguments = half_arguments(arguments, torch.device(device))
    network, per_step, static = networks
    backend = prepare(per_step, "auto", memory)
    prepare(static, backend, memory)
    ours = f"stepquant {bits}, {backend}"
    found = Contest(
        network,
        per_step,
        arguments,
        {
            full: lambda: network(**arguments),
            f"{ours}, a scale a step": lambda: per_step(**arguments),
            f"{ours}, static scales": lambda: static(**arguments),
        },
        event_seconds if on_gpu else wall_seconds,
        torch.cuda.get_device_name() if on_gpu else f"{_processor()}, {torch.get_num_threads()} threads",
        backend,
        fallbacks(per_step),
    )
    if on_gpu:
        found.contestants[f"{ours}, a CUDA graph"] = captured(per_step, arguments)
        found.weight_bytes = {"bfloat16": weight_bytes(network), bits: weight_bytes(per_step)}
    if names:
        others = (
            gpu_peers(network, arguments, names)
            if on_gpu
            else peers(network, arguments, torch.get_num_threads(), names)
        )
        found.contestants |= others[0]
        found.left_out = others[1]
    return found


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
