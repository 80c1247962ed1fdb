"""Interrupted, on a full disk, or in a folder that cannot be written: one sentence, and nothing half-written."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import stepquant
from stepquant import workspace
from stepquant.errors import StepquantError
from stepquant.workspace import Workspace, allocate, digest, fingerprint, uninterrupted, write_atomic

SMALL = stepquant.Calibration(samples=8, steps=2)


def test_an_interruption_waits_for_the_file(tmp_path):
    def write(path: Path) -> None:
        path.write_text("half")
        os.kill(os.getpid(), signal.SIGINT)
        path.write_text("whole")

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", write)
    assert (tmp_path / "file").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_draft_of_a_killed_process_is_removed_and_that_of_a_live_one_left(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".file.{dead.pid}.draft").write_text("orphan")
    (tmp_path / f".file.{os.getppid()}.draft").write_text("somebody's")
    (tmp_path / ".file.notes.draft").write_text("a user's")
    write_atomic(tmp_path / "file", lambda path: path.write_text("new"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".file.{os.getppid()}.draft",
        ".file.notes.draft",
        "file",
    ]


def test_mapped_memory_takes_its_space_at_once(tmp_path, monkeypatch):
    tensor = allocate(tmp_path / "x.bin", (1000, 256), torch.float32)
    assert (tmp_path / "x.bin").stat().st_blocks * 512 >= 1_024_000
    tensor[:] = 1
    again = allocate(tmp_path / "x.bin", (2, 2), torch.float32)
    again[:] = 7
    assert bool((tensor == 1).all()), "a file that is replaced stays with those who have it mapped"

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workspace.os, "posix_fallocate", full)
    with pytest.raises(StepquantError, match="no space left"):
        allocate(tmp_path / "y.bin", (10,), torch.float32)
    assert not (tmp_path / "y.bin").exists()
    assert allocate(None, (3, 2), torch.int64).shape == (3, 2)


class Disk:
    """Every way in which a run writes, failing from the n-th time on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, code: int) -> None:
        self.folder, self.code, self.left = folder, code, -1
        for module, name in (
            (workspace, "save_file"),
            (workspace, "sync"),
            (workspace.os, "posix_fallocate"),
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


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_fails_at_any_write(code, unconditional_pipeline, tmp_path, monkeypatch):
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
    wanted = {path.name: path.read_bytes() for path in (tmp_path / "run" / "out").rglob("*") if path.is_file()}
    # The first writes, where stages are kept, one after the other; of the many of saving some.
    for failing in [*range(6), *range(6, calls, max(1, calls // 6))]:
        shutil.rmtree(tmp_path / "run")
        disk.fail_after(failing)
        with pytest.raises(StepquantError) as caught:
            run()
        disk.fail_after(-1)
        said = str(caught.value)
        assert "\n" not in said
        assert ("no space left" if code == errno.ENOSPC else "Read-only file system") in said
        assert not (tmp_path / "run" / "out").exists(), "nothing half-written"
        kept = sorted(path.name for path in (tmp_path / "run").rglob("samples-*.safetensors"))
        run()
        assert {p.name: p.read_bytes() for p in (tmp_path / "run" / "out").rglob("*") if p.is_file()} == wanted
        assert kept == sorted(path.name for path in (tmp_path / "run").rglob("samples-*.safetensors"))[: len(kept)]


def test_a_replaced_folder_survives_a_kill_between_the_two_renames(unconditional_pipeline, tmp_path, monkeypatch):
    quantized = stepquant.quantize(
        unconditional_pipeline, "w8a8", recipe="minmax", calibration=SMALL, backend="reference"
    )
    stepquant.save(quantized, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.previous")  # where the kill leaves it
    with pytest.raises(StepquantError, match="--overwrite"):
        stepquant.save(quantized, tmp_path / "out")
    stepquant.load(tmp_path / "out")
    stepquant.save(quantized, tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_sigint_ends_a_run_with_130_and_a_sentence(unconditional_folder, tmp_path):
    """The real thing: a process, a signal, and the same command again."""
    command = [sys.executable, "-m", "stepquant.cli.main", "quantize", str(unconditional_folder), "--out"]
    command += [str(tmp_path / "out"), "--samples", "8", "--steps", "4", "--iterations", "400", "--bits", "w4a8"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    began = time.monotonic()
    while not list(tmp_path.glob(".out.work/block-*")) and time.monotonic() - began < 200:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip().splitlines()[-1].startswith("stepquant: interrupted")
    assert "run the same command again" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()
    with Workspace(tmp_path / ".out.work") as kept:
        assert all(kept.load(path.stem) is not None for path in kept.folder.glob("block-*"))
        assert not list(kept.folder.glob(".*.draft"))


def _inputs():
    """Pairs of arguments of a pipeline's call that differ where `repr` does not tell, or only in what they hold."""
    mask, other = np.zeros((64, 64)), np.zeros((64, 64))
    other[32, 32] = 1
    tensor = torch.zeros(5000)
    last = tensor.clone()
    last[2500] = 1
    image = Image.fromarray(np.zeros((8, 8), np.uint8))
    coloured = image.convert("P")
    coloured.putpalette([255, 0, 0] * 256)
    names = np.array(["a", "b"], object)
    return [
        (mask, other), (mask, mask.astype(np.float32)), (mask, mask.reshape(32, 128)), ([tensor], [last]),
        ({"a": (mask, 1)}, {"a": (other, 1)}), ({"a": 1}, {"b": 1}), ([1.0], [2.0]), (names, names[::-1]),
        (image, Image.fromarray(np.eye(8, dtype=np.uint8))), (image.convert("P"), coloured),
    ]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), _inputs())
def test_fingerprints_are_of_what_an_argument_holds(one, other):
    assert digest(fingerprint(one)) == digest(fingerprint(copy.deepcopy(one))), "the same elsewhere"
    assert digest(fingerprint(one)) != digest(fingerprint(other))
