from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stepquant.cli.main import app
from stepquant.studies import read_study
from stepquant.studies.run import append_line, finished, read_lines

FINE = 'minmax = {}\n"own" = { recipe = "OWN:Fine" }\n'
BAD = 'raising = { recipe = "OWN:Raising" }\ndying = { recipe = "OWN:Dying" }\n'


def _run(path, *options):
    cache = path.parent / "cache"
    return CliRunner().invoke(app, ["study", str(path), "--cache", str(cache), *map(str, options)])


def test_a_study_from_the_first_cell_to_the_table(write_study):
    path = write_study(BAD + FINE, seeds="[0, 1]")
    results = path.parent.parent / "results" / "small.jsonl"

    result = _run(path, "--jobs", 2, "--seeds", 0)
    assert result.exit_code == 1, result.output
    assert "raising failed: ValueError: out of luck" in result.stderr
    assert "dying failed: the process died with exit code 7" in result.stderr
    lines = read_lines(results)
    assert {line["label"] for line in lines} == {"minmax", "own"}
    minmax, own = sorted(lines, key=lambda line: line["label"])
    assert minmax["psnr_db"] == own["psnr_db"]
    assert minmax["step_error_percent"] == own["step_error_percent"]
    assert 20 < minmax["psnr_db"] < 80
    assert len(minmax["step_error_percent"]) == 2
    assert all(0 < error < 20 for error in minmax["step_error_percent"])
    assert 0.5 < minmax["ssim"] < 1
    assert 1e8 < minmax["peak_memory_bytes"] < 1e10
    assert minmax["threads"] == 1
    assert minmax["evaluation"] == {"count": 3, "steps": 2, "frechet_count": None}
    assert set(minmax["versions"]) == {"stepquant", "torch", "diffusers"}
    assert "frechet_classifier" not in minmax, "no classifier for the images of this model"
    cached = sorted(file.name for file in (path.parent / "cache").glob("*.safetensors"))
    assert [name.partition("-")[0] for name in cached] == ["reference", "samples"], "cells do not share"

    # Existing cells are not computed again; other noise gives other values.
    result = _run(path, "--recipes", "minmax", "--recipes", "own", "--recipes", "minmax")
    assert result.exit_code == 0, result.output
    assert "2 cells to do" in result.stdout
    lines = read_lines(results)
    assert [line["seed"] for line in lines] == [0, 0, 1, 1]
    assert lines[-1]["step_error_percent"] != minmax["step_error_percent"]

    table = _run(path, "--table", "--figure", path.with_suffix(".png"))
    assert table.exit_code == 0, table.output
    values = [line["psnr_db"] for line in lines if line["label"] == "minmax"]
    assert f"| `minmax` | {sum(values) / 2:.2f} ± " in table.stdout
    assert "(2) |" in table.stdout
    errors = [statistics.geometric_mean(line["step_error_percent"]) for line in lines if line["label"] == "minmax"]
    assert f"| `minmax` | {sum(errors) / 2:.2f} ± " in table.stdout
    assert "| `dying` |  |" in table.stdout
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For sockets of processes, whose paths have at most a hundred characters."""
    with tempfile.TemporaryDirectory(prefix="sq") as folder:
        yield Path(folder)


def test_an_interruption_ends_the_workers_and_leaves_no_partial_line(write_study, tmp_path, short_folder):
    path = write_study('sleeping = { recipe = "OWN:Sleeping" }')
    environment = os.environ | {"TMPDIR": str(short_folder), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "stepquant.cli.main", "study", str(path), "--cache", str(tmp_path / "cache")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    assert process.stdout is not None
    assert "1 cells to do" in process.stdout.readline()
    assert process.stdout.readline() == "asleep\n"
    os.killpg(process.pid, signal.SIGINT)
    # Returns when all pipes are closed: the worker, which would sleep for ten minutes, is gone too.
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert message.count("\n") == 1
    assert "Run the same command again" in message
    assert not read_lines(path.parent.parent / "results" / "small.jsonl")
    assert not list(short_folder.glob("stepquant-*"))


def test_a_truncated_line_is_skipped(tmp_path):
    results = tmp_path / "new" / "lines.jsonl"
    append_line(results, {"a": 1})
    with results.open("a") as file:
        file.write('{"b": ')
    assert read_lines(results) == [{"a": 1}]
    append_line(results, {"c": 3})
    assert read_lines(results) == [{"a": 1}, {"c": 3}]
    assert finished(results) == {}, "lines without a cell are ignored"


def test_a_cell_that_is_listed_under_two_names_is_one(write_study):
    path = write_study('minmax = {}\nagain = { recipe = "minmax" }')
    cells = list(read_study(path).cells())
    line = cells[0].model_dump(mode="json") | {"psnr_db": 30.0}
    results = path.parent.parent / "results" / "small.jsonl"
    append_line(results, line)
    assert list(finished(results)) == [cells[1].identity]
    tables = _run(path, "--table").stdout
    assert "| `minmax` | 30.00 |" in tables
    assert "| `again` | 30.00 |" in tables
    assert json.loads(results.read_text())["label"] == "minmax"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", 0], "jobs is 0"),
        (["--figure", "none.xyz"], "ends in .png"),
        (["--figure", "none.png"], "no results of this study"),
        (["--recipes", "magic"], "no recipe 'magic'"),
    ],
)
def test_invalid_options_are_rejected(options, message, write_study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_study(FINE)
    result = _run(path, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "none.png").exists()
