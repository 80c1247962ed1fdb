"""How long work tells how far it is; the command draws it, a library call stays silent unless given a drawer."""

from __future__ import annotations

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
