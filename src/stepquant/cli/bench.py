"""``stepquant bench``: the latency of a model on this machine, in integers and in full precision."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from stepquant.cli.options import Json, Memory
from stepquant.cli.output import check_writable_file, print_table, progress, table_of, write_json

if TYPE_CHECKING:
    from stepquant.bench.run import Result


class BenchDevice(StrEnum):
    """Devices that a benchmark runs on."""

    cpu = "cpu"
    cuda = "cuda"


def bench(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A full-precision MODEL, or arch:cifar-ddpm, sd15, wan, qwen-image or flux."
        ),
    ],
    bits: Annotated[str, typer.Option(help="Bits of weights and activations, such as w8a8.")] = "w8a8",
    batch: Annotated[int, typer.Option(help="Samples per step.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Timed rounds; each candidate is timed once per round.", min=1)] = 10,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's.", min=1)] = None,
    peers: Annotated[
        bool, typer.Option("--peers", help="Also time torch.compile, bfloat16, and the int8 of other libraries.")
    ] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Time only this peer (torch, OpenVINO, optimum-quanto, torchao), to save memory; can be repeated.",
        ),
    ] = None,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Also show the parts of a step and their share of the int8 peak.")
    ] = False,
    memory: Memory = "unpacked",
    resident: Annotated[
        bool, typer.Option("--resident", help="Also measure the memory of the network, full precision and quantized.")
    ] = False,
    device: Annotated[BenchDevice, typer.Option(help="Device to run on.")] = BenchDevice.cpu,
    json: Json = None,
) -> None:
    """Time one step of a model in floats and in integers."""
    import torch

    from stepquant.bench.peers import PEERS
    from stepquant.bench.run import benchmark

    check_writable_file(json)
    if threads is not None:
        torch.set_num_threads(threads)
    result = benchmark(
        model,
        bits,
        batch=batch,
        rounds=rounds,
        peers=PEERS if peers else peer or (),
        memory=memory,
        device=device.value,
        roofline=roofline,
        resident=resident,
        progress=progress(),
    )
    _print(result)
    if json is not None:
        write_json(json, result.model_dump(exclude_none=True))
        typer.echo(f"figures: {json}")


def _print(result: Result) -> None:
    print_table(_timings(result))
    typer.echo(f"per-step scales take {result.per_step_over_static:.3f} times as long as static scales (median)")
    for name, reason in result.left_out.items():
        typer.echo(f"{name} is left out: {reason}.")
    if result.fallbacks:
        few = ", ".join(result.fallbacks[:5])
        typer.echo(
            f"{len(result.fallbacks)} layers and attentions have no integer kernel and run in floating point: {few}"
        )
    if result.roofline is not None:
        print_table(_roofline(result))
    if result.resident is not None:
        print_table(_resident(result))
    if result.weight_bytes is not None:
        half, quantized = result.weight_bytes.values()
        typer.echo(f"weights on the GPU: {quantized / 1e6:.1f} MB, {quantized / half:.2f}x those in bfloat16")


def _timings(result: Result) -> Table:
    table = table_of(
        f"{result.model}, batch {result.batch}, {result.machine}", ("",), ("latency per step", "speed", "quartiles")
    )
    for timing in result.timings:
        low, high = timing.speedup_quartiles
        latency = f"{timing.seconds * 1e3:.1f} ms"
        table.add_row(timing.name, latency, f"{timing.speedup:.2f}x", f"{low:.2f} to {high:.2f}")
    return table


def _resident(result: Result) -> Table:
    table = table_of("memory of the network in a separate process", ("",), ("held", "of float32", "peak of a step"))
    sizes = result.resident or []
    for size in sizes:
        ratio = f"{size.held / sizes[0].held:.2f}x"
        table.add_row(size.name, f"{size.held / 1e6:.1f} MB", ratio, f"{size.peak / 1e6:.1f} MB")
    return table


def _roofline(result: Result) -> Table:
    title = f"parts of a step in integers; measured int8 peak: {(result.int8_peak or 0) / 1e12:.2f} TOPS"
    table = table_of(title, ("",), ("time per step", "share", "of the peak"))
    for share in result.roofline or ():
        reached = f"{share.share_of_peak:.0%}" if share.operations else ""
        table.add_row(share.part, f"{share.seconds * 1e3:.1f} ms", f"{share.share_of_time:.0%}", reached)
    return table
