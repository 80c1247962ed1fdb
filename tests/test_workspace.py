"""Interruptions, full disks and read-only folders: a message of one line, and no partial files."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import stepquant
from stepquant import files, workspace
from stepquant.errors import StepquantError
from stepquant.workspace import Workspace

SMALL = stepquant.Calibration(samples=8, steps=2)


class Disk:
    """Makes every function that writes fail from the n-th call on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, code: int) -> None:
        self.folder, self.code, self.left = folder, code, -1
        for module, name in (
            (workspace, "save_file"),
            (files, "sync"),
            (files.os, "posix_fallocate"),
            (stepquant.checkpoint.write, "save_file"),
            (stepquant.checkpoint.write, "sync"),
            (Path, "mkdir"),
            (Path, "write_text"),
            (Path, "rename"),
            (Path, "replace"),
        ):
            monkeypatch.setattr(module, name, self._failing(getattr(module, name)))

    def _failing(self, original):
        def call(*args, **kwargs):
            if self.left == 0:
                raise OSError(self.code, os.strerror(self.code))
            self.left -= 1
            self.calls += 1
            return original(*args, **kwargs)

        return call

    def fail_after(self, calls: int) -> None:
        self.left, self.calls = calls, 0


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_failure_of_any_write(code, unconditional_pipeline, tmp_path, monkeypatch):
    def run() -> None:
        quantized = stepquant.quantize(
            unconditional_pipeline,
            "w8a8",
            recipe="minmax",
            calibration=SMALL,
            workspace=tmp_path / "run" / "work",
            backend="reference",
        )
        stepquant.save(quantized, tmp_path / "run" / "out")

    disk = Disk(monkeypatch, tmp_path, code)
    disk.fail_after(-1)
    run()
    calls = disk.calls
    out = tmp_path / "run" / "out"
    expected = contents(out)
    # Each of the first writes, which store stages, and some of the many that save the checkpoint.
    for failing in [*range(6), *range(6, calls, max(1, calls // 6))]:
        shutil.rmtree(tmp_path / "run")
        disk.fail_after(failing)
        with pytest.raises(StepquantError) as caught:
            run()
        disk.fail_after(-1)
        message = str(caught.value)
        assert "\n" not in message
        assert ("no space left" if code == errno.ENOSPC else "Read-only file system") in message
        if failing == calls - 1:  # flushing the rename of a complete folder
            assert contents(out) == expected
            shutil.rmtree(out)
        assert not out.exists(), "no partial checkpoint"
        stored = sorted(path.name for path in (tmp_path / "run").rglob("samples-*.safetensors"))
        run()
        assert contents(out) == expected
        assert stored == sorted(path.name for path in (tmp_path / "run").rglob("samples-*.safetensors"))[: len(stored)]


def test_a_replaced_folder_survives_a_kill_between_the_two_renames(unconditional_pipeline, tmp_path, monkeypatch):
    quantized = stepquant.quantize(
        unconditional_pipeline, "w8a8", recipe="minmax", calibration=SMALL, backend="reference"
    )
    stepquant.save(quantized, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.previous")  # the state after the kill
    with pytest.raises(StepquantError, match="overwrite=True"):
        stepquant.save(quantized, tmp_path / "out")
    stepquant.load(tmp_path / "out")
    stepquant.save(quantized, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sigint_ends_a_run_with_exit_code_130_and_a_message(unconditional_folder, tmp_path):
    """In a separate process that receives the signal."""
    command = [sys.executable, "-m", "stepquant.cli.main", "quantize", str(unconditional_folder), "--out"]
    command += [str(tmp_path / "out"), "--samples", "8", "--steps", "4", "--set", "iterations=400", "--bits", "w4a8"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    began = time.monotonic()
    while not list(tmp_path.glob(".out.work/block-*")) and time.monotonic() - began < 200:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert message.strip().splitlines()[-1].startswith("stepquant: interrupted")
    assert "Run the same command again" in message and "Traceback" not in message
    assert not (tmp_path / "out").exists()
    with Workspace(tmp_path / ".out.work") as resumed:
        assert all(resumed.load(path.stem) is not None for path in resumed.folder.glob("block-*"))
        assert not list(resumed.folder.glob(".*.draft"))
