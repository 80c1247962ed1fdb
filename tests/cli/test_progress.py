from __future__ import annotations

import io

from rich.console import Console

from stepquant.cli.progress import RichProgress


def test_bars_on_a_terminal_show_the_remaining_time():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    progress = RichProgress(console)
    with progress.task("outer", 2) as advance:
        with progress.task("inner [x]", 3) as advance_inner:
            advance_inner(3)
        advance(2)
    with progress.task("again", 1) as advance:
        advance(1)
    text = console.file.getvalue()
    assert all(part in text for part in ("outer", "inner [x]", "again", "2/2", "3/3", "left"))


def test_one_line_per_task_in_a_file():
    console = Console(file=io.StringIO(), width=100)
    progress = RichProgress(console)
    with progress.task("work", 7) as advance:
        advance(7)
    progress.note("[done]")
    assert console.file.getvalue() == "work (7)\n[done]\n"
