"""Files written whole or not at all, on any operating system; and digests of what they hold."""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import json
import math
import os
import platform
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil
import torch
from PIL.Image import Image
from safetensors import SafetensorError
from torch import Tensor

from stepquant.errors import StepquantError

WINDOWS = os.name == "nt"
ABANDONED_DAYS = 7
"""Age after which a draft of another host is removed: whether its process is alive cannot be seen from here."""
CHUNK = 1 << 22
"""Bytes of zeros that are written at a time."""


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a draft beside `path`, flush it to disk and rename it: the file is complete or absent.

    SIGINT is delayed until the file is in place.

    Raises:
        StepquantError: if the disk is full, read-only or not writable.
    """
    draft = draft_path(path)
    with uninterrupted():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_orphans(path)
            write(draft)
            sync(draft)
            draft.replace(path)
            sync(path.parent)
        except (OSError, SafetensorError) as error:
            raise cannot_write(path, error) from None
        finally:
            remove(draft)


def write_text(path: Path, text: str) -> None:
    """`write_atomic` of a text, as UTF-8."""
    write_atomic(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def draft_path(path: Path) -> Path:
    """Return a new name beside `path` for its unfinished content: ``.NAME.HOST.PROCESS.TOKEN.draft``."""
    return path.with_name(f".{path.name}.{host()}.{os.getpid()}.{secrets.token_hex(4)}.draft")


def remove_orphans(path: Path) -> None:
    """Remove drafts of `path` whose process on this host has ended, and those of other hosts after a week."""
    for draft in path.parent.glob(f".{glob.escape(path.name)}.*.*.*.draft"):
        *_, made_by, process, _token, _ending = draft.name.split(".")
        if process.isdigit() and _is_orphan(draft, made_by, int(process)):
            remove(draft)


def _is_orphan(draft: Path, made_by: str, process: int) -> bool:
    if made_by == host():
        return not psutil.pid_exists(process)
    return _age(draft) > ABANDONED_DAYS * 86400


@functools.cache
def host() -> str:
    """Return 8 hexadecimal digits that identify this host; a container with its own process ids is a host."""
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def _age(path: Path) -> float:
    """Seconds since the last change of a file or folder; 0 if it has just gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def remove(path: Path) -> None:
    """Remove a file or folder where that is possible; failures are ignored."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay SIGINT until the context ends. Python delivers signals to the main thread only, so others need nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if pending:
        signal.raise_signal(signal.SIGINT)


def allocate(path: Path | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor in a new file mapped into memory, or in memory without a `path`.

    The disk space is reserved at once: a mapped file for which the disk is full later would kill the process.

    Raises:
        StepquantError: if there is not enough space.
    """
    count = math.prod(shape)
    if path is None or count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    try:
        path.unlink(missing_ok=True)  # a process that has the old file mapped keeps it
        with path.open("wb") as file:
            _reserve(file, count * dtype.itemsize)
    except OSError as error:
        remove(path)
        raise cannot_write(path, error) from None
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).reshape(tuple(shape))


def _reserve(file: BinaryIO, size: int) -> None:
    """Give an empty file `size` bytes of disk space, by writing zeros where the system offers no better way."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
    if shutil.disk_usage(Path(file.name).parent).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for start in range(0, size, CHUNK):
        file.write(bytes(min(CHUNK, size - start)))


def sync(path: Path) -> None:
    """Flush a file to disk; a folder, too, where the operating system can."""
    is_folder = path.is_dir()
    if is_folder and WINDOWS:
        return
    descriptor = os.open(path, os.O_RDWR if WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: Exception) -> StepquantError:
    """Return the error that reports a failed write."""
    code = getattr(error, "errno", None)
    if code == errno.ENOSPC or "No space left" in str(error):
        return StepquantError(f"no space left on the disk while writing {path}. Free some space and try again.")
    reason = os.strerror(code) if code else str(error)
    return StepquantError(f"cannot write {path}: {reason}. Choose a folder that is writable.")


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value in its canonical form, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of tensors, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def fingerprint(value: Any) -> Any:
    """Return a JSON-able stand-in for an argument: digests of the contents of tensors, arrays and images.

    Dictionaries, lists and tuples are traversed; anything else becomes its `repr`.
    """
    if isinstance(value, Tensor):
        return tensors_digest({"value": value})
    if isinstance(value, Image):
        return [value.mode, value.getpalette(), fingerprint(np.asarray(value))]
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, np.ndarray):
        return fingerprint(value.tolist())
    if isinstance(value, Mapping):
        return {repr(key): fingerprint(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [fingerprint(entry) for entry in value]
    return repr(value)
