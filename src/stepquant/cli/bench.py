"""``stepquant bench``: how fast a model is on this machine, in integers and otherwise."""

from __future__ import annotations

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
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Only this of the peers (torch, OpenVINO, optimum-quanto, torchao), and others that --peer names: a "
            "large network has no memory for all at once.",
        ),
    ] = None,
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

    from stepquant.bench.contest import contest
    from stepquant.bench.gpu import check_gpu
    from stepquant.bench.measure import measure
    from stepquant.bench.networks import example, find_network
    from stepquant.bench.peers import PEERS, check_peers
    from stepquant.bench.resident import resident as resident_of
    from stepquant.bench.roofline import roofline
    from stepquant.config import QuantSpec
    from stepquant.runtime import MEMORY, check_memory

    at_least_one("batch", batch)
    at_least_one("rounds", rounds)
    check_memory(memory)
    QuantSpec.parse(bits).check_quantizes()
    if device not in ("cpu", "cuda"):
        raise StepquantError(f"device is {device!r}: expected cpu or cuda.")
    if device == "cuda":
        if shares or resident:
            raise StepquantError("--roofline and --resident measure a processor: leave them out with --device cuda.")
        check_gpu()
    names = PEERS if peers else check_peers(peer or ())
    if json is not None:
        check_writable_file(json)
    if threads is not None:
        at_least_one("threads", threads)
        torch.set_num_threads(threads)
    network = find_network(model)
    arguments = example(network, batch)
    with torch.no_grad():
        found = contest(network, arguments, bits, memory=memory, device=device, names=names)
        with progress().task("Timing", rounds + 1) as advance:
            timings = measure(found.contestants, rounds, advance, found.seconds_of)
        spent = roofline(found.per_step, found.arguments) if shares else None
    sizes = []
    if resident:
        sizes = [resident_of("torch float32", found.network, batch)]
        sizes += [resident_of(f"stepquant {bits}, {kind}", found.per_step, batch, kind) for kind in MEMORY]
    price = median(one / other for one, other in zip(timings[1].times, timings[2].times, strict=True))
    console().print(_table(f"{model}, batch {batch}, {found.machine}", timings))
    typer.echo(f"a scale a step takes {price:.3f} times as long as static scales (median over the rounds)")
    for name, reason in found.left_out.items():
        typer.echo(f"{name} is left out: {reason}.")
    if found.fallbacks:
        few = ", ".join(found.fallbacks[:5])
        typer.echo(f"{len(found.fallbacks)} layers have no integer kernel and run in floating point: {few}")
    if spent is not None:
        console().print(_roofline_table(*spent))
    if sizes:
        console().print(_memory_table(sizes))
    if found.weight_bytes:
        halved, held = found.weight_bytes.values()
        typer.echo(f"weights on the GPU: {held / 1e6:.1f} MB, {held / halved:.2f}x those in bfloat16")
    if json is not None:
        figures: dict[str, Any] = {
            "model": model,
            "bits": bits,
            "batch": batch,
            "rounds": rounds,
            "machine": found.machine,
            "backend": found.backend,
            "memory": memory,
            "fallbacks": found.fallbacks,
            "left_out": found.left_out,
            "per_step_over_static": price,
            "timings": [timing.model_dump() for timing in timings],
        }
        if found.weight_bytes:
            figures |= {"weight_bytes": found.weight_bytes}
        if sizes:
            figures |= {"resident": [size.model_dump() for size in sizes]}
        if spent is not None:
            figures |= {"int8_peak": spent[0], "roofline": [share.model_dump() for share in spent[1]]}
        _write(json, figures)
        typer.echo(f"figures: {json}")


def _write(path: Path, figures: dict[str, Any]) -> None:
    import json

    from stepquant.files import write_atomic

    write_atomic(path, lambda draft: draft.write_text(json.dumps(figures, indent=2) + "\n"))


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
