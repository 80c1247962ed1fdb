"""How long quantization takes on many accelerators: the model behind docs/distributed.md, and its assumptions.

    python benchmarks/trust/scaling.py --json benchmarks/results/trust-scaling.json

Not measured: counts of passes and bytes, times assumed speeds. A Stable Diffusion 1.5 UNet by default.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """A reconstruction and the machine it runs on.

    Attributes:
        samples, trajectories, steps, iterations, batch_size: of the recipe.
        halves: samples of the denoiser per image and step, 2 with guidance.
        chunk: samples per pass (`stepquant.models.chunk_size`), and trajectories.
        blocks, layers: of the denoiser.
        width: inputs of a typical layer, kernel included: the side of its second moments.
        output_bytes: size of a typical block's output for one sample.
        learned: trained parameters per block.
        pass_seconds: one sample through the whole denoiser.
        simulation: time of a pass with simulated quantization, in units of `pass_seconds`.
        learning: time of a training pass (forward and backward), in units of `pass_seconds`.
        glue: share of a pass needed to reach a block, repeated in every process.
        solve_seconds: GPTQ of one layer, in the main process only.
        bandwidth: bytes per second between processes.
        latency: seconds of one exchange.
    """

    samples: int = 1024
    trajectories: int = 64
    steps: int = 50
    iterations: int = 500
    batch_size: int = 16
    halves: int = 2
    chunk: int = 4
    blocks: int = 61
    layers: int = 280
    width: int = 2000
    output_bytes: int = 4 * 320 * 64 * 64
    learned: int = 10
    pass_seconds: float = 0.010
    simulation: float = 1.5
    learning: float = 4.5
    glue: float = 0.02
    solve_seconds: float = 0.15
    bandwidth: float = 25e9
    latency: float = 50e-6


def busiest_share(pieces: int, processes: int) -> float:
    """Share of the work of the busiest process when `pieces` are distributed."""
    return math.ceil(pieces / processes) / pieces


def stages(job: Job, processes: int) -> dict[str, float]:
    """Seconds of each stage."""
    several = processes > 1
    passes = job.samples * job.pass_seconds
    chunks = math.ceil(job.samples / job.chunk)
    collecting = job.trajectories * job.steps * job.halves * job.pass_seconds
    parts = min(16, chunks)
    layers_a_block = job.layers / job.blocks
    share = math.ceil(job.batch_size / processes) / job.batch_size
    exchanged = {
        "replay": 2 * job.samples * job.output_bytes * job.blocks,
        "gptq": job.layers * parts * 2 * 4 * job.width**2,
    }
    return {
        "collecting": collecting * busiest_share(math.ceil(job.trajectories / job.chunk), processes),
        "replay": passes * (1 + job.simulation) * busiest_share(chunks, processes)
        + several * (exchanged["replay"] / job.bandwidth + 2 * chunks * job.blocks * job.latency),
        "reaching blocks": 2 * passes * job.glue * job.blocks,
        "gptq": passes * (1 + job.simulation) * layers_a_block * busiest_share(parts, processes)
        + several * exchanged["gptq"] / job.bandwidth,
        "rounding": job.layers * job.solve_seconds,
        "learning": job.iterations * job.batch_size * job.pass_seconds * job.learning * share
        + several * job.iterations * job.blocks * (job.latency + 4 * job.learned / job.bandwidth),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = {}
    for name, job in {"minibatch of 16": Job(), "minibatch of 64": Job(batch_size=64)}.items():
        table = {}
        alone = sum(stages(job, 1).values())
        for processes in (1, 2, 4, 8, 16, 32, 64):
            seconds = stages(job, processes)
            total = sum(seconds.values())
            table[processes] = {stage: round(value, 1) for stage, value in seconds.items()} | {
                "total": round(total, 1),
                "efficiency": round(alone / total / processes, 2),
            }
        result[name] = {"assumptions": asdict(job), "seconds": table}
        print(name)
        for processes, row in table.items():
            print(f"  {processes:3d}", *(f"{stage} {value:g}" for stage, value in row.items()), sep="  ")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
