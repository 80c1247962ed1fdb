"""Progress bars on the terminal, with the remaining time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from stepquant.progress import Progress


class RichProgress(Progress):
    """Draws each task as a bar on `console`; if that is not a terminal, prints one line as each task begins."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: Bars | None = None

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        if not self.console.is_terminal:
            self.note(f"{description} ({total})")
            yield lambda n: None
        elif self._bars is not None:
            yield self._add(self._bars, description, total)
        else:
            with self._new_bars() as self._bars:
                try:
                    yield self._add(self._bars, description, total)
                finally:
                    self._bars = None

    def note(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def plan(self, make: Callable[[], object]) -> None:
        self.note(str(make()))

    def _new_bars(self) -> Bars:
        return Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )

    @staticmethod
    def _add(bars: Bars, description: str, total: int) -> Callable[[int], None]:
        task = bars.add_task(description, total=total)
        return lambda n: bars.advance(task, n)
