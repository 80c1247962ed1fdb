"""Atomic writes, drafts of interrupted processes, memory-mapped files, and digests of arguments."""

from __future__ import annotations

import copy
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stepquant import files
from stepquant.errors import StepquantError
from stepquant.files import allocate, digest, draft_path, fingerprint, uninterrupted, write_atomic

DAY = 86400


def test_an_interruption_is_delivered_after_the_write(tmp_path):
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


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def draft_of(draft: Path, process: int) -> Path:
    """Return the name of the draft of another process on this host."""
    return draft.with_name(draft.name.replace(f".{os.getpid()}.", f".{process}."))


def test_drafts_of_ended_processes_are_removed_and_those_of_running_ones_kept(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    draft_of(draft_path(tmp_path / "file"), ended.pid).write_text("orphan")
    draft_of(draft_path(tmp_path / "folder"), ended.pid).mkdir()
    live = draft_of(draft_path(tmp_path / "file"), os.getppid())
    live.write_text("of a running process")
    (tmp_path / ".file.my.notes.draft").write_text("of a user")
    write_atomic(tmp_path / "file", lambda path: path.write_text("new"))
    write_atomic(tmp_path / "folder", lambda path: path.write_text("new"))
    assert names(tmp_path) == sorted([live.name, ".file.my.notes.draft", "file", "folder"])


def test_a_draft_of_another_host_is_removed_when_it_is_old(tmp_path, monkeypatch):
    """On a shared file system, the process of another host cannot be looked up."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(files, "host", lambda: "0123abcd")
        theirs = draft_of(draft_path(tmp_path / "file"), ended.pid)
    theirs.write_text("half of a file")
    write_atomic(tmp_path / "file", lambda path: path.write_text("new"))
    assert theirs.exists(), "work of a live process on another host"
    eight_days_ago = time.time() - 8 * DAY
    os.utime(theirs, (eight_days_ago, eight_days_ago))
    write_atomic(tmp_path / "file", lambda path: path.write_text("newer"))
    assert names(tmp_path) == ["file"]


def test_two_writers_of_a_file_use_separate_drafts(tmp_path):
    """The second starts and finishes while the first is writing."""

    def first(path: Path) -> None:
        path.write_text("first, incomplete")
        write_atomic(tmp_path / "file", lambda second: second.write_text("second"))
        assert path.read_text() == "first, incomplete"
        path.write_text("first")

    write_atomic(tmp_path / "file", first)
    assert (tmp_path / "file").read_text() == "first"
    assert names(tmp_path) == ["file"]


def test_memory_mapped_files_allocate_disk_space_immediately(tmp_path, monkeypatch):
    tensor = allocate(tmp_path / "x.bin", (1000, 256), torch.float32)
    assert (tmp_path / "x.bin").stat().st_blocks * 512 >= 1_024_000
    tensor[:] = 1
    again = allocate(tmp_path / "x.bin", (2, 2), torch.float32)
    again[:] = 7
    assert bool((tensor == 1).all()), "a replaced file stays valid where it is mapped"

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "posix_fallocate", full)
    with pytest.raises(StepquantError, match="no space left"):
        allocate(tmp_path / "y.bin", (10,), torch.float32)
    assert not (tmp_path / "y.bin").exists()
    assert allocate(None, (3, 2), torch.int64).shape == (3, 2)


@pytest.mark.parametrize("reason", [None, errno.EOPNOTSUPP])
def test_without_fallocate_zeros_are_written(reason, tmp_path, monkeypatch):
    if reason is None:
        monkeypatch.delattr(files.os, "posix_fallocate")
    else:

        def unsupported(*_args: object) -> None:
            raise OSError(reason, os.strerror(reason))

        monkeypatch.setattr(files.os, "posix_fallocate", unsupported)
    tensor = allocate(tmp_path / "x.bin", (1_500_000,), torch.float32)
    assert (tmp_path / "x.bin").stat().st_size == 6_000_000
    assert (tmp_path / "x.bin").stat().st_blocks * 512 >= 6_000_000, "not a sparse file"
    assert not tensor.any()
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: files.shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(StepquantError, match="no space left"):
        allocate(tmp_path / "y.bin", (10,), torch.float32)
    assert names(tmp_path) == ["x.bin"]


def test_files_are_written_where_folders_cannot_be_flushed(tmp_path, monkeypatch):
    """Windows cannot open a folder; some network file systems cannot flush one."""
    opened = []
    original = os.open
    with monkeypatch.context() as windows:
        windows.setattr(files, "WINDOWS", True)
        windows.setattr(files.os, "open", lambda path, flags: opened.append(path) or original(path, flags))
        write_atomic(tmp_path / "one", lambda path: path.write_text("1"))
    assert len(opened) == 1 and opened[0].name.endswith(".draft")
    flush = os.fsync

    def refuses_folders(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(descriptor)

    monkeypatch.setattr(files.os, "fsync", refuses_folders)
    write_atomic(tmp_path / "two", lambda path: path.write_text("2"))
    assert names(tmp_path) == ["one", "two"]


def _inputs():
    """Pairs of pipeline arguments whose contents differ, though their `repr` may be equal."""
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
def test_fingerprints_depend_on_the_contents_of_an_argument(one, other):
    assert digest(fingerprint(one)) == digest(fingerprint(copy.deepcopy(one))), "equal for a copy"
    assert digest(fingerprint(one)) != digest(fingerprint(other))
