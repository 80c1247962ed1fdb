"""Where long work keeps what it has finished, so that starting again continues instead of beginning anew."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepquant.distributed import Ranks
from stepquant.errors import StepquantError


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it to disk and rename it into place: whole, or not there.

    An interruption (SIGINT) waits until the file is there.

    Raises:
        StepquantError: if the disk is full, read-only or not writable.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    with uninterrupted():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_orphans(path)
            write(draft)
            sync(draft)
            draft.replace(path)
            sync(path.parent)
        except (OSError, SafetensorError) as error:
            raise cannot_write(path, error) from None
        finally:
            remove(draft)


def remove(path: Path) -> None:
    """Remove a file or folder as far as that is possible; a failure is no news where something else has failed."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back SIGINT until the context ends, and then let it interrupt."""
    held: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, _frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


def _remove_orphans(path: Path) -> None:
    """Remove drafts of `path` whose process was killed."""
    for draft in path.parent.glob(f".{glob.escape(path.name)}.*.draft"):
        process = draft.name.split(".")[-2]
        if process.isdigit() and not _alive(int(process)):
            remove(draft)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def allocate(path: Path | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor to be filled, in a new file mapped into memory, so that it need not fit into it; in memory without one.

    The disk space is taken at once: a mapped file that finds the disk full later would kill the process.

    Raises:
        StepquantError: if there is no space for it.
    """
    count = math.prod(shape)
    if path is None or count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    try:
        path.unlink(missing_ok=True)  # who still has the old one mapped keeps it
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
    except OSError as error:
        remove(path)
        raise cannot_write(path, error) from None
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).reshape(tuple(shape))


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: Exception) -> StepquantError:
    """The sentence for a failed write."""
    code = getattr(error, "errno", None)
    if code == errno.ENOSPC or "No space left" in str(error):
        return StepquantError(f"no space left on the disk while writing {path}: free some and run the command again.")
    reason = os.strerror(code) if code else str(error)
    return StepquantError(f"cannot write {path}: {reason}; choose a folder that can be written.")


def digest(value: Any) -> str:
    """SHA-256 of a JSON-able value in its canonical form, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def fingerprint(value: Any) -> Any:
    """Stands for an argument, JSON-able: what tensors, arrays and images hold, and not where they lie.

    Dictionaries, lists and tuples are entered; of anything else it is the `repr`.
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


class Workspace:
    """A folder of finished stages, each a safetensors file under a key made of the stage's name and its inputs.

    A stage file that is damaged counts as absent: the stage is computed again. Of several processes the main one reads
    and writes, and tells the others.
    """

    def __init__(self, folder: Path, ranks: Ranks | None = None) -> None:
        self.folder, self.ranks = folder, ranks or Ranks()
        self._lock: TextIO | None = None

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a finished stage, or None."""
        return self.ranks.broadcast(self._read(key) if self.ranks.is_main else None)

    def _read(self, key: str) -> dict[str, Tensor] | None:
        path = self.folder / f"{key}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
                recorded = (file.metadata() or {}).get("digest")
        except (OSError, SafetensorError):
            return None
        return tensors if recorded == tensors_digest(tensors) else None

    def save(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep a finished stage, atomically."""
        if not self.ranks.is_main:
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"digest": tensors_digest(tensors)}
        write_atomic(self.folder / f"{key}.safetensors", lambda path: save_file(tensors, path, metadata))

    def scratch(self, name: str) -> Path:
        """An empty folder of this process for files that need not survive."""
        folder = self.folder / (name if self.ranks.is_main else f"{name}-{self.ranks.rank}")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise cannot_write(folder, error) from None
        return folder

    def __enter__(self) -> Workspace:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.ranks.is_main:
                return self
            self._lock = (self.folder / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StepquantError(
                f"another process is working in {self.folder}: wait for it, or give another output folder."
            ) from None
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def remove(self) -> None:
        """Delete everything in it; the work it held is done and kept elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)
