"""``stepquant bench``: how fast a model is on this machine, in integers and otherwise."""

from __future__ import annotations

import platform
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from stepquant.cli.options import Memory, at_least_one, check_writable_file, console, progress
from stepquant.errors import StepquantError

if TYPE_CHECKING:
    from stepquant.bench.measure import Timing
    from stepquant.bench.resident import Resident
    from stepquant.bench.roofline import Share

PER_STEP_ROWS = 50


def bench(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A full-precision MODEL, or arch:cifar-ddpm, or arch:sd15.")
    ],
    bits: Annotated[str, typer.Option(help="Bits of weights and activations, such as w8a8.")] = "w8a8",
    batch: Annotated[int, typer.Option(help="Samples a step.")] = 8,
    rounds: Annotated[int, typer.Option(help="Timed rounds; each contestant is timed once a round.")] = 10,
    threads: Annotated[int | None, typer.Option(help="Threads; default: torch's own number.")] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also time torch.compile, bfloat16, and other libraries' int8.")
    ] = False,
    shares: Annotated[
        bool, typer.Option("--roofline", help="Also tell where a step's time goes, and the share of the int8 peak.")
    ] = False,
    memory: Memory = "unpacked",
    resident: Annotated[
        bool, typer.Option("--resident", help="Also measure the memory of the network, full precision and quantized.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, or cuda.")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Time a step of a model in full precision and in integers, on random data."""
    import torch

    from stepquant.bench.gpu import captured, check_gpu, event_seconds, half_on, moved, weight_bytes
    from stepquant.bench.measure import measure, wall_seconds
    from stepquant.bench.networks import example, find_network, quantize_network
    from stepquant.bench.peers import gpu_peers
    from stepquant.bench.peers import peers as peers_of
    from stepquant.bench.resident import resident as resident_of
    from stepquant.bench.roofline import roofline
    from stepquant.runtime import MEMORY, check_memory, fallbacks, prepare
    from stepquant.workspace import write_atomic

    at_least_one("batch", batch)
    at_least_one("rounds", rounds)
    check_memory(memory)
    if device not in ("cpu", "cuda"):
        raise StepquantError(f"device is {device!r}: expected cpu or cuda.")
    if device == "cuda":
        if shares or resident:
            raise StepquantError("--roofline and --resident measure a processor: leave them out with --device cuda.")
        check_gpu()
    if json is not None:
        check_writable_file(json)
    if threads is not None:
        at_least_one("threads", threads)
        torch.set_num_threads(threads)
    network = find_network(model)
    arguments = example(network, batch)
    per_step = quantize_network(network, arguments, bits, PER_STEP_ROWS)
    static = quantize_network(network, arguments, bits, 1)
    seconds_of, full = wall_seconds, "torch eager float32"
    if device == "cuda":
        seconds_of, full = event_seconds, "torch eager bfloat16"
        network, per_step, static = (half_on(each, torch.device(device)) for each in (network, per_step, static))
        arguments = moved(arguments, torch.device(device))
    backend = prepare(per_step, "auto", memory)
    prepare(static, backend, memory)
    slow = fallbacks(per_step)
    with torch.no_grad():
        contestants: dict[str, Any] = {
            full: lambda: network(**arguments),
            f"stepquant {bits}, {backend}, a scale a step": lambda: per_step(**arguments),
            f"stepquant {bits}, {backend}, static scales": lambda: static(**arguments),
        }
        left_out: dict[str, str] = {}
        if device == "cuda":
            contestants[f"stepquant {bits}, {backend}, a CUDA graph"] = captured(per_step, arguments)
        if peers:
            others, left_out = (
                gpu_peers(network, arguments)
                if device == "cuda"
                else peers_of(network, arguments, torch.get_num_threads())
            )
            contestants |= others
        with progress().task("Timing", rounds + 1) as advance:
            timings = measure(contestants, rounds, advance, seconds_of)
        found = roofline(per_step, arguments) if shares else None
    sizes = []
    if resident:
        sizes = [resident_of("torch float32", network, batch)]
        sizes += [resident_of(f"stepquant {bits}, {kind}", per_step, batch, kind) for kind in MEMORY]
    machine = f"{_processor()}, {torch.get_num_threads()} threads"
    if device == "cuda":
        machine = torch.cuda.get_device_name()
        held = {"bfloat16": weight_bytes(network), bits: weight_bytes(per_step)}
    console().print(_table(f"{model}, batch {batch}, {machine}", timings))
    price = _median_ratio(timings[1], timings[2])
    typer.echo(f"a scale a step takes {price:.3f} times as long as static scales (median over the rounds)")
    for name, reason in left_out.items():
        typer.echo(f"{name} is left out: {reason}.")
    if slow:
        typer.echo(f"{len(slow)} layers have no integer kernel and run in floating point: {', '.join(slow[:5])}")
    if found is not None:
        console().print(_roofline_table(*found))
    if sizes:
        console().print(_memory_table(sizes))
    if device == "cuda":
        ratio = held[bits] / held["bfloat16"]
        typer.echo(f"weights on the GPU: {held[bits] / 1e6:.1f} MB, {ratio:.2f}x those in bfloat16")
    if json is not None:
        figures = {
            "model": model,
            "bits": bits,
            "batch": batch,
            "rounds": rounds,
            "machine": machine,
            "backend": backend,
            "memory": memory,
            "fallbacks": slow,
            "left_out": left_out,
            "per_step_over_static": price,
            "timings": [timing.model_dump() for timing in timings],
        }
        if device == "cuda":
            figures |= {"weight_bytes": held}
        if sizes:
            figures |= {"resident": [size.model_dump() for size in sizes]}
        if found is not None:
            figures |= {"int8_peak": found[0], "roofline": [share.model_dump() for share in found[1]]}
        write_atomic(json, lambda draft: draft.write_text(_pretty(figures)))
        typer.echo(f"figures: {json}")


def _median_ratio(first: Timing, second: Timing) -> float:
    return median(one / other for one, other in zip(first.times, second.times, strict=True))


def _pretty(figures: dict[str, Any]) -> str:
    import json

    return json.dumps(figures, indent=2) + "\n"


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _table(title: str, timings: list[Timing]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in ("a step", "speed", "quartiles"):
        table.add_column(name, justify="right")
    for timing in timings:
        low, high = timing.speedup_quartiles
        row = (f"{timing.seconds * 1e3:.1f} ms", f"{timing.speedup:.2f}x", f"{low:.2f} to {high:.2f}")
        table.add_row(timing.name, *row)
    return table


def _memory_table(sizes: list[Resident]) -> Table:
    table = Table(title="memory of the network, in a process of its own", title_justify="left")
    table.add_column("")
    for name in ("held", "of float32", "peak of a step"):
        table.add_column(name, justify="right")
    for size in sizes:
        ratio = f"{size.held / sizes[0].held:.2f}x"
        table.add_row(size.name, f"{size.held / 1e6:.1f} MB", ratio, f"{size.peak / 1e6:.1f} MB")
    return table


def _roofline_table(peak: float, shares: list[Share]) -> Table:
    table = Table(title=f"a step in integers; int8 peak measured: {peak / 1e12:.2f} TOPS", title_justify="left")
    table.add_column("")
    for name in ("a step", "share", "of the peak"):
        table.add_column(name, justify="right")
    for share in shares:
        reached = f"{share.share_of_peak:.0%}" if share.operations else ""
        table.add_row(share.part, f"{share.seconds * 1e3:.1f} ms", f"{share.share_of_time:.0%}", reached)
    return table
