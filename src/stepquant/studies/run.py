"""The cells of a study in worker processes; lines are added to the results by this process alone."""

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
"""A cell and its figures."""


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: with its line, or with the sentence of what went wrong; `left` cells are still to do."""

    cell: Cell
    line: Line | None
    problem: str
    left: int


def run_study(
    study: Study, results: Path, cache: Path, *, jobs: int = 1, tell: Callable[[Outcome], None] = lambda _: None
) -> int:
    """Compute the cells that `results` does not have; returns how many failed.

    Each runs in a process of its own with one torch thread. A cell that raises, or whose process dies, is told and
    leaves no line, so the next run tries it again. Other processes may add to the same results meanwhile.

    Args:
        results: JSON lines, each a cell and its figures; a line is added whole or not at all.
        cache: folder of full-precision images and calibration samples, shared by cells and studies.
        jobs: processes at a time.
        tell: called after each cell.

    Raises:
        StepquantError: for a study that asks for something that does not exist, or results that cannot be written.
        KeyboardInterrupt: after the workers have been ended.
    """
    if jobs < 1:
        raise StepquantError(f"jobs is {jobs}: expected at least 1.")
    pending = list({cell.identity: cell for cell in missing(study, results)}.values())
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])  # imports torch and diffusers once, not once a cell
    running: dict[Connection, tuple[Cell, BaseProcess]] = {}
    failed = 0
    try:
        while pending or running:
            while pending and len(running) < jobs:
                cell = pending.pop(0)
                if cell.identity in finished(results):
                    continue
                ours, theirs = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(target=work, args=(cell, cache, theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = (cell, process)
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
    """The cells of `study` that have no line in `results`, in the study's order."""
    done = finished(results)
    return (cell for cell in study.cells() if cell.identity not in done)


def finished(results: Path) -> dict[str, Line]:
    """Identity of each cell that `results` holds -> its line; of two lines of a cell the later counts."""
    lines = {}
    for line in read_lines(results):
        try:
            cell = Cell.model_validate({name: line[name] for name in Cell.model_fields})
        except (KeyError, ValidationError, StepquantError):
            continue  # written by something else, or by a version with other fields: neither done nor in the way
        lines[cell.identity] = line
    return lines


def read_lines(results: Path) -> list[Line]:
    """All lines of a file, which may not exist; one that is no JSON (a write that a crash cut off) is left out.

    Raises:
        StepquantError: for a file that cannot be read.
    """
    if not results.exists():
        return []
    try:
        texts = results.read_text().splitlines()
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
    """Add a line in one write, flushed to disk; a cut-off line before it is ended first."""
    try:
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                cut_off = file.read(1) != b"\n"
            else:
                cut_off = False
            file.write(b"\n" * cut_off + json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise cannot_write(results, error) from None


def _answer(connection: Connection, process: BaseProcess) -> tuple[Line | None, str]:
    """What a worker sent; a pipe that closes empty is a process that died."""
    try:
        answer = connection.recv()
    except EOFError:
        process.join()
        return None, f"the process died with exit code {process.exitcode}"
    finally:
        connection.close()
    process.join()
    return (None, answer) if isinstance(answer, str) else (answer, "")
