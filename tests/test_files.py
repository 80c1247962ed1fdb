"""Files are written whole or not at all; drafts of live processes stay; digests follow contents."""

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


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def as_if_by(draft: Path, process: int) -> Path:
    """The name that another process of this host would give its draft."""
    return draft.with_name(draft.name.replace(f".{os.getpid()}.", f".{process}."))


def test_a_draft_of_an_ended_process_is_removed_and_that_of_a_live_one_left(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    as_if_by(draft_path(tmp_path / "file"), ended.pid).write_text("orphan")
    as_if_by(draft_path(tmp_path / "folder"), ended.pid).mkdir()
    live = as_if_by(draft_path(tmp_path / "file"), os.getppid())
    live.write_text("of a running process")
    (tmp_path / ".file.my.own.notes.draft").write_text("of a user")
    write_atomic(tmp_path / "file", lambda path: path.write_text("new"))
    write_atomic(tmp_path / "folder", lambda path: path.write_text("new"))
    assert names(tmp_path) == sorted([live.name, ".file.my.own.notes.draft", "file", "folder"])


def test_a_draft_of_another_host_stays_until_it_is_old(tmp_path, monkeypatch):
    """On a shared file system the other host's process is not among the processes of this one."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(files, "host", lambda: "0123abcd")
        theirs = as_if_by(draft_path(tmp_path / "file"), ended.pid)
    theirs.write_text("half of a file")
    write_atomic(tmp_path / "file", lambda path: path.write_text("new"))
    assert theirs.exists(), "work of a live process on another host"
    eight_days_ago = time.time() - 8 * DAY
    os.utime(theirs, (eight_days_ago, eight_days_ago))
    write_atomic(tmp_path / "file", lambda path: path.write_text("newer"))
    assert names(tmp_path) == ["file"]


def test_two_writers_of_a_file_have_a_draft_each(tmp_path):
    """The second begins and ends while the first writes; the first is whole all the same."""

    def first(path: Path) -> None:
        path.write_text("first, begun")
        write_atomic(tmp_path / "file", lambda second: second.write_text("second"))
        assert path.read_text() == "first, begun"
        path.write_text("first")

    write_atomic(tmp_path / "file", first)
    assert (tmp_path / "file").read_text() == "first"
    assert names(tmp_path) == ["file"]


def test_mapped_memory_takes_its_space_at_once(tmp_path, monkeypatch):
    tensor = allocate(tmp_path / "x.bin", (1000, 256), torch.float32)
    assert (tmp_path / "x.bin").stat().st_blocks * 512 >= 1_024_000
    tensor[:] = 1
    again = allocate(tmp_path / "x.bin", (2, 2), torch.float32)
    again[:] = 7
    assert bool((tensor == 1).all()), "a file that is replaced stays with those who have it mapped"

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "posix_fallocate", full)
    with pytest.raises(StepquantError, match="no space left"):
        allocate(tmp_path / "y.bin", (10,), torch.float32)
    assert not (tmp_path / "y.bin").exists()
    assert allocate(None, (3, 2), torch.int64).shape == (3, 2)


@pytest.mark.parametrize("reason", [None, errno.EOPNOTSUPP])
def test_without_fallocate_the_space_is_written(reason, tmp_path, monkeypatch):
    if reason is None:
        monkeypatch.delattr(files.os, "posix_fallocate")
    else:

        def refused(*_args: object) -> None:
            raise OSError(reason, os.strerror(reason))

        monkeypatch.setattr(files.os, "posix_fallocate", refused)
    tensor = allocate(tmp_path / "x.bin", (1_500_000,), torch.float32)
    assert (tmp_path / "x.bin").stat().st_size == 6_000_000
    assert (tmp_path / "x.bin").stat().st_blocks * 512 >= 6_000_000, "no file with holes"
    assert not tensor.any()
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: files.shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(StepquantError, match="no space left"):
        allocate(tmp_path / "y.bin", (10,), torch.float32)
    assert names(tmp_path) == ["x.bin"]


def test_where_folders_cannot_be_flushed_files_are_written_all_the_same(tmp_path, monkeypatch):
    """Windows opens no folder; some network file systems refuse to flush one."""
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
