"""A benchmark of one network on one device: full precision, integers, and other libraries."""

from __future__ import annotations

import platform
from collections.abc import Collection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import BaseModel

from stepquant.bench.gpu import captured, check_gpu, event_seconds, weight_bytes
from stepquant.bench.measure import Timing, measure, wall_seconds
from stepquant.bench.networks import find_network, half_arguments, half_network, quantize_network
from stepquant.bench.peers import Candidate, check_peers, cpu_peers, gpu_peers
from stepquant.bench.resident import Resident, measure_resident
from stepquant.bench.roofline import Share, measure_roofline
from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.progress import Progress
from stepquant.runtime import MEMORY, check_memory, fallbacks, prepare

PER_STEP_ROWS = 50


class Result(BaseModel):
    """Figures of a benchmark.

    Attributes:
        machine: CPU and threads, or GPU.
        backend: runtime of the integers.
        fallbacks: names of the layers and attentions that it cannot run.
        left_out: peer -> why it cannot run here.
        per_step_over_static: median over the rounds of the latency with per-step scales over that with static scales.
        timings: of full precision, per-step scales, static scales, and peers.
        weight_bytes: bytes of the weights on a GPU, by type.
        int8_peak: measured peak, operations per second.
    """

    model: str
    bits: str
    batch: int
    rounds: int
    machine: str
    backend: str
    memory: str
    fallbacks: list[str]
    left_out: dict[str, str]
    per_step_over_static: float
    timings: list[Timing]
    weight_bytes: dict[str, int] | None = None
    resident: list[Resident] | None = None
    int8_peak: float | None = None
    roofline: list[Share] | None = None


@torch.no_grad()
def benchmark(
    model: str,
    bits: str,
    *,
    batch: int = 8,
    rounds: int = 10,
    peers: Collection[str] = (),
    memory: str = "unpacked",
    device: str = "cpu",
    roofline: bool = False,
    resident: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Time one step of a model in full precision and in integers.

    Args:
        model: a full-precision model, or one of `networks.NETWORKS` as ``arch:NAME``.
        peers: other libraries to time, of `peers.PEERS`.
        memory: how weights of up to 4 bits are held.
        device: ``"cpu"`` or ``"cuda"``.
        roofline: also measure the parts of a step and the int8 peak.
        resident: also measure the memory of the networks.

    Raises:
        StepquantError: for a model, bits, peers or a device that cannot be benchmarked.
    """
    check_memory(memory)
    QuantSpec.parse(bits).check_quantizes()
    names = check_peers(peers)
    on_gpu = device == "cuda"
    if on_gpu and (roofline or resident):
        raise StepquantError("`roofline` and `resident` measure a CPU and cannot be used with `device=cuda`.")
    if on_gpu:
        check_gpu()
    network, arguments = find_network(model, batch)
    networks = [network, *(quantize_network(network, arguments, bits, rows) for rows in (PER_STEP_ROWS, 1))]
    if on_gpu:
        networks = [half_network(each, torch.device(device)) for each in networks]
        arguments = half_arguments(arguments, torch.device(device))
    network, per_step, static = networks
    backend = prepare(per_step, "auto", memory)
    prepare(static, backend, memory)
    candidates = _candidates(network, per_step, static, arguments, f"stepquant {bits}, {backend}")
    if on_gpu:
        candidates[f"stepquant {bits}, {backend}, CUDA graph"] = captured(per_step, arguments)
    others, left_out = (gpu_peers if on_gpu else cpu_peers)(network, arguments, names)
    with (progress or Progress()).task("Timing", rounds + 1) as advance:
        seconds_of = event_seconds if on_gpu else wall_seconds
        timings = measure(candidates | others, rounds, advance, seconds_of)
    ratios = [one / other for one, other in zip(timings[1].times, timings[2].times, strict=True)]
    peak, shares = measure_roofline(per_step, arguments) if roofline else (None, None)
    return Result(
        model=model,
        bits=bits,
        batch=batch,
        rounds=rounds,
        machine=torch.cuda.get_device_name() if on_gpu else f"{cpu_name()}, {torch.get_num_threads()} threads",
        backend=backend,
        memory=memory,
        fallbacks=fallbacks(per_step),
        left_out=left_out,
        per_step_over_static=median(ratios),
        timings=timings,
        weight_bytes={"bfloat16": weight_bytes(network), bits: weight_bytes(per_step)} if on_gpu else None,
        resident=_resident(network, per_step, bits, arguments) if resident else None,
        int8_peak=peak,
        roofline=shares,
    )


def _candidates(network: Any, per_step: Any, static: Any, arguments: dict[str, Any], name: str) -> dict[str, Candidate]:
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    return {
        f"torch eager {dtype}": lambda: network(**arguments),
        f"{name}, per-step scales": lambda: per_step(**arguments),
        f"{name}, static scales": lambda: static(**arguments),
    }


def _resident(network: Any, quantized: Any, bits: str, arguments: dict[str, Any]) -> list[Resident]:
    packings = [measure_resident(f"stepquant {bits}, {kind}", quantized, arguments, kind) for kind in MEMORY]
    return [measure_resident("torch float32", network, arguments), *packings]


def cpu_name() -> str:
    """Name of the CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
