"""Latency of one step with dynamic activations and channel groups, in interleaved rounds with static ones.

python -m benchmarks.dynamic_speed MODEL BATCH ROUNDS THREADS OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from stepquant.bench.measure import measure
from stepquant.bench.networks import find_network, quantize_network
from stepquant.bench.run import cpu_name
from stepquant.config import QuantSpec
from stepquant.runtime import fallbacks, prepare
from stepquant.runtime.native.build import available

SPECS = {
    "W8A8 static": QuantSpec(bits="w8a8"),
    "W8A8 dynamic": QuantSpec(bits="w8a8", activations="dynamic"),
    "W4A8 static": QuantSpec(bits="w4a8"),
    **{
        f"{bits.upper()} dynamic, groups of {size}": QuantSpec(bits=bits, activations="dynamic", group_size=size)
        for bits in ("w8a8", "w4a8", "w4a4")
        for size in (64, 32)
    },
}


@torch.no_grad()
def run(name: str, batch: int, rounds: int, threads: int) -> dict[str, object]:
    """Figures as ``stepquant bench`` has them: `speedup` is relative to the first of `SPECS`."""
    torch.set_num_threads(threads)
    network, arguments = find_network(name, batch)
    networks = {label: quantize_network(network, arguments, spec, 1) for label, spec in SPECS.items()}
    for each in networks.values():
        prepare(each, "native")
    candidates = {label: (lambda each=each: each(**arguments)) for label, each in networks.items()}
    timings = measure(candidates, rounds)
    return {
        "model": name,
        "batch": batch,
        "rounds": rounds,
        "machine": f"{cpu_name()}, {threads} threads",
        "instructions": available()[0],
        "fallbacks": {label: len(fallbacks(each)) for label, each in networks.items()},
        "timings": [timing.model_dump() for timing in timings],
    }


if __name__ == "__main__":
    model, *numbers, output = sys.argv[1:]
    result = run(model, *(int(number) for number in numbers))
    Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for timing in result["timings"]:  # type: ignore[attr-defined]
        print(f"{timing['name']:30} {timing['seconds'] * 1e3:8.1f} ms  {1 / timing['speedup']:.3f}x")
