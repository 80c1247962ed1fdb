"""Running the cells of a study in worker processes. Only this process appends to the results."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stepquant.errors import StepquantError
from stepquant.files import cannot_write
from stepquant.studies.spec import Cell, Study
from stepquant.studies.worker import work

Line = dict[str, Any]
"""A cell and its metrics."""


@dataclass(frozen=True)
class Outcome:
    """Result of a cell: its line, or an error message; `left` cells remain."""

    cell: Cell
    line: Line | None
    problem: str
    left: int


def run_study(
    study: Study, results: Path, cache: Path, *, jobs: int = 1, tell: Callable[[Outcome], None] = lambda _: None
) -> int:
    """Compute the cells that `results` does not have; return the number of failures.

    Each cell runs in a separate process with one torch thread. A cell that raises, or whose process dies, leaves no
    line, so that the next run tries it again. Other processes can append to the same results meanwhile.

    Args:
        results: JSON lines, one per cell, appended atomically.
        cache: folder of full-precision images and calibration samples, shared by cells and studies.
        jobs: number of simultaneous processes.
        tell: called after each cell.

    Raises:
        StepquantError: for an invalid study, or results that cannot be written.
        KeyboardInterrupt: after the workers have ended.
    """
    if jobs < 1:
        raise StepquantError(f"jobs is {jobs}; expected at least 1.")
    pending = list({cell.identity: cell for cell in missing(study, results)}.values())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])  # imports torch and diffusers once, not once per cell
    running: dict[Connection, tuple[Cell, BaseProcess]] = {}
    failed = 0
    try:
        while pending or running:
            while pending and len(running) < jobs:
                cell = pending.pop(0)
                if cell.identity in finished(results):
                    continue
                receiver, sender = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(target=work, args=(cell, cache, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = (cell, process)
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                cell, process = running.pop(connection)
                line, problem = _answer(connection, process)
                if line is not None:
                    append_line(results, line)
                failed += line is None
                tell(Outcome(cell, line, problem, len(pending) + len(running)))
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()
    return failed


def missing(study: Study, results: Path) -> Iterator[Cell]:
    """The cells of `study` without a line in `results`, in the study's order."""
    done = finished(results)
    return (cell for cell in study.cells() if cell.identity not in done)


def finished(results: Path) -> dict[str, Line]:
    """Identity of each cell in `results` -> its line, the last one of duplicates."""
    lines = {}
    for line in read_lines(results):
        try:
            cell = Cell.model_validate({name: line[name] for name in Cell.model_fields})
        except (KeyError, ValidationError, StepquantError):
            continue  # a line of another program, or of a version with other fields
        lines[cell.identity] = line
    return lines


def read_lines(results: Path) -> list[Line]:
    """Read all lines of a file, if it exists; a line that a crash truncated is skipped.

    Raises:
        StepquantError: if the file cannot be read.
    """
    if not results.exists():
        return []
    try:
        texts = results.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StepquantError(f"results {results} cannot be read: {error}.") from None
    lines = []
    for text in texts:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return [line for line in lines if isinstance(line, dict)]


def append_line(results: Path, line: Line) -> None:
    """Append a line in one write, flushed to disk, and end a truncated line before it."""
    try:
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                truncated = file.read(1) != b"\n"
            else:
                truncated = False
            file.write(b"\n" * truncated + json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(results, error) from None


def _answer(connection: Connection, process: BaseProcess) -> tuple[Line | None, str]:
    """The line or error message from a worker; a pipe that closes empty means that its process died."""
    try:
        answer = connection.recv()
    except EOFError:
        process.join()
        return None, f"the process died with exit code {process.exitcode}"
    finally:
        connection.close()
    process.join()
    return (None, answer) if isinstance(answer, str) else (answer, "")
