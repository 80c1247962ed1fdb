"""How long work tells how far it is; the command draws it, a library call stays silent unless given a drawer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Progress:
    """Silent base. Subclasses override `task` and `note`."""

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A piece of work of `total` units; the yielded function says that n more are done."""
        yield lambda n: None

    def note(self, message: str) -> None:
        """Something worth a line."""


class Stopwatch(Progress):
    """Passes everything on, and adds up how long each piece of work takes.

    Attributes:
        clock: what tells the time, in seconds.
        seconds: of every description.
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
