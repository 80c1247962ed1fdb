"""A folder in which long work stores finished stages, so that running it again continues where it stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.files import cannot_write, tensors_digest, write_atomic


class Workspace:
    """Finished stages, each a safetensors file named by a key: the stage's name and a digest of its inputs.

    A damaged stage file counts as absent: the stage is computed again. Only the main process reads and writes; it
    broadcasts what it read. As a context manager, a workspace locks its folder against other runs.

    Args:
        folder: need not exist.
        ranks: the processes that share the work; by default this one alone.
    """

    def __init__(self, folder: Path, ranks: Ranks | None = None) -> None:
        self.folder, self.ranks = folder, ranks or Ranks()
        self._lock = FileLock(folder / "lock", timeout=0)

    def load(self, key: str) -> dict[str, Tensor] | None:
        """Return the tensors of a finished stage, or None."""
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
        """Store a finished stage, atomically."""
        if not self.ranks.is_main:
            return
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        metadata = {"digest": tensors_digest(tensors)}
        write_atomic(self.folder / f"{key}.safetensors", lambda path: save_file(tensors, path, metadata))

    def scratch(self, name: str) -> Path:
        """Return an empty folder of this process for temporary files."""
        folder = self.folder / (name if self.ranks.is_main else f"{name}-{self.ranks.rank}")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from None
        return folder

    def __enter__(self) -> Workspace:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.ranks.is_main:
                self._lock.acquire()
        except Timeout:
            raise StepquantError(
                f"another process is working in {self.folder}. Wait for it, or choose another output folder."
            ) from None
        except OSError as error:
            raise cannot_write(self.folder, error) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
