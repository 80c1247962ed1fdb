"""Progress of long work: the command displays it; a library call is silent unless it is given a `Progress`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Base class without output. Subclasses override `task` and `note`."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Begin a task of `total` units; the yielded function reports that n more units are done."""
        yield lambda n: None

    def note(self, message: str) -> None:
        """Report a message of one line."""

    def plan(self, make: Callable[[], object]) -> None:
        """The plan of the work, made by calling `make`, which runs the denoiser: only if it is shown."""


class Stopwatch(Progress):
    """Forwards everything to another `Progress` and sums the duration of each task.

    Attributes:
        clock: function that returns the time in seconds.
        seconds: description of a task -> duration.
    """

    def __init__(self, inner: Progress | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.inner, self.clock = inner or Progress(), clock
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        start = self.clock()
        with self.inner.task(description, total) as advance:
            yield advance
        self.seconds[description] += self.clock() - start

    def note(self, message: str) -> None:
        self.inner.note(message)

    def plan(self, make: Callable[[], object]) -> None:
        self.inner.plan(make)
