"""Interleaved rounds, medians, and ratios with their spread."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median, quantiles

from pydantic import BaseModel


class Timing(BaseModel):
    """One contestant.

    Attributes:
        name: for people.
        seconds: median of a step.
        speedup: median over rounds of the first contestant's time over this one's, in the same round.
        speedup_quartiles: first and third quartile of that ratio: its spread.
        times: of each round, in seconds.
    """

    name: str
    seconds: float
    speedup: float
    speedup_quartiles: tuple[float, float]
    times: list[float]


def wall_seconds(run: Callable[[], object]) -> float:
    """What `run` takes by the clock on the wall."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    contestants: dict[str, Callable[[], object]],
    rounds: int,
    advance: Callable[[int], None] | None = None,
    seconds_of: Callable[[Callable[[], object]], float] = wall_seconds,
) -> list[Timing]:
    """Time every contestant once a round, after a round that does not count.

    Because they alternate, a machine that is busy with something else slows all alike, and ratios stay meaningful. Each
    runs twice and its second time counts, since the first finds another's data in the caches; every other round goes
    backwards.

    Args:
        seconds_of: runs a contestant and says what it took.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_index in range(-1, rounds):
        for name, run in list(contestants.items())[:: -1 if round_index % 2 else 1]:
            run()
            taken = seconds_of(run)
            if round_index >= 0:
                times[name].append(taken)
        if advance is not None:
            advance(1)
    base = next(iter(times.values()))
    results = []
    for name, seconds in times.items():
        ratios = [first / own for first, own in zip(base, seconds, strict=True)]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        results.append(
            Timing(
                name=name,
                seconds=median(seconds),
                speedup=median(ratios),
                speedup_quartiles=(low, high),
                times=[round(value, 6) for value in seconds],
            )
        )
    return results
