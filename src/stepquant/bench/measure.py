"""Interleaved timing rounds: medians, and ratios with their spread."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles

from pydantic import BaseModel


class Timing(BaseModel):
    """Latency of one candidate.

    Attributes:
        seconds: median latency of a step.
        speedup: median over rounds of the first candidate's latency over this one's in the same round.
        speedup_quartiles: first and third quartile of that ratio.
        times: latency in each round, in seconds.
    """

    name: str
    seconds: float
    speedup: float
    speedup_quartiles: tuple[float, float]
    times: list[float]


def wall_seconds(run: Callable[[], object]) -> float:
    """Wall-clock duration of `run`."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    candidates: dict[str, Callable[[], object]],
    rounds: int,
    advance: Callable[[int], None] | None = None,
    seconds_of: Callable[[Callable[[], object]], float] = wall_seconds,
) -> list[Timing]:
    """Time every candidate once per round, after a warm-up round.

    Candidates alternate, so that other load on the machine slows all of them alike and ratios stay meaningful. Each
    runs twice per round and the second run counts, because the first finds another candidate's data in the caches.
    Every other round runs in reverse order.

    Args:
        seconds_of: runs a candidate and returns its duration.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_index in range(-1, rounds):
        for name, run in list(candidates.items())[:: -1 if round_index % 2 else 1]:
            run()
            seconds = seconds_of(run)
            if round_index >= 0:
                times[name].append(seconds)
        if advance is not None:
            advance(1)
    base = next(iter(times.values()))
    return [_timing(name, seconds, base) for name, seconds in times.items()]


def _timing(name: str, seconds: list[float], base: list[float]) -> Timing:
    ratios = [reference / value for reference, value in zip(base, seconds, strict=True)]
    low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return Timing(
        name=name,
        seconds=median(seconds),
        speedup=median(ratios),
        speedup_quartiles=(low, high),
        times=[round(value, 6) for value in seconds],
    )
