"""The layout of a quantized pipeline on disk: a diffusers folder with ``stepquant.json`` at its root.

    model_index.json, scheduler/, vae/, ...            as diffusers writes them
    unet/ or transformer/
        config.json                                    with a `quantization_config`
        diffusion_pytorch_model.safetensors            packed integers, tables, and the parameters left in float
    stepquant.json                                     `Manifest`: provenance, and size and SHA-256 of every other file
    README.md                                          the model card, which may be edited: the manifest leaves it out

Files do not depend on time or machine: the same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stepquant.errors import StepquantError
from stepquant.files import digest

FORMAT_VERSION = 2
MANIFEST = "stepquant.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
QUANT_METHOD = "stepquant"
DIGEST = "stepquant_digest"
"""Metadata key of the digest of a weight file's tensors (`stepquant.files.tensors_digest`). Files that a component's
``save_pretrained`` wrote have it, since no manifest lists them."""
LARGEST_JSON = 16 << 20
"""Maximum bytes of a JSON file."""


class FileRecord(BaseModel):
    """Size and SHA-256 of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(BaseModel):
    """Provenance of a quantized pipeline, and sizes and hashes of its files.

    Attributes:
        format_version: version of this layout; a reader refuses a newer one.
        component: name of the quantized denoiser in the pipeline.
        provenance: recipe with its arguments, spec, calibration, seed, source model, versions of the libraries.
        files: relative path -> record, for every file of the folder but this one.
        digest: SHA-256 over all of the above in canonical JSON.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: int
    component: str
    provenance: dict[str, Any]
    files: dict[str, FileRecord]
    digest: str = ""

    def computed_digest(self) -> str:
        return digest(self.model_dump(mode="json", exclude={"digest"}))

    def sealed(self) -> Manifest:
        """Copy with the digest filled in."""
        return self.model_copy(update={"digest": self.computed_digest()})

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder claims to be a quantized pipeline."""
    return (folder / MANIFEST).is_file()


def record(path: Path) -> FileRecord:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(bytes=path.stat().st_size, sha256=sha256)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size; raises `StepquantError` for anything else."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise StepquantError(f"{path} is larger than any file of its kind: the checkpoint is damaged.")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StepquantError(f"{path} is missing: the checkpoint is incomplete, copy or quantize it again.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StepquantError(f"{path} cannot be read as JSON ({error}): the checkpoint is damaged.") from None
    if not isinstance(value, dict):
        raise StepquantError(f"{path} is not a JSON object. The checkpoint is damaged.")
    return value


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a quantized pipeline and check its digest.

    Raises:
        StepquantError: if it is missing, malformed, damaged, or of a newer format.
    """
    if not is_checkpoint(folder):
        raise StepquantError(f"{folder} has no {MANIFEST}; it was not written by stepquant.")
    raw = read_json(folder / MANIFEST)
    check_version(raw.get("format_version"), str(folder))
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise StepquantError(f"{folder / MANIFEST} is malformed at {where}: the checkpoint is damaged.") from None
    if manifest.computed_digest() != manifest.digest:
        raise StepquantError(f"{folder / MANIFEST} does not match its own digest: the checkpoint is damaged.")
    return manifest


def check_version(version: Any, what: str) -> int:
    """Return `version`; raise `StepquantError` if it is not a format that can be read."""
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        remedy = "Upgrade stepquant" if newer else "The checkpoint is damaged; quantize the model again"
        raise StepquantError(f"{what} has format version {version!r}; expected 1 to {FORMAT_VERSION}. {remedy}.")
    return version


def verify(folder: Path, manifest: Manifest, component: str | None = None) -> None:
    """Check every file, or those of one component, against the manifest.

    Raises:
        StepquantError: for the first file that is missing, changed, unlisted, a link, or outside the folder.
    """
    for name, expected in manifest.files.items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or "\\" in name or str(relative) != name:
            raise StepquantError(f"{folder / MANIFEST} lists {name!r}, which lies outside the folder: not loaded.")
        if component is not None and relative.parts[0] != component:
            continue
        path = folder / relative
        check_link(path, folder)
        if not path.is_file():
            raise StepquantError(f"{path} is missing: the checkpoint is incomplete, copy or quantize it again.")
        size = path.stat().st_size
        if size != expected.bytes:
            raise StepquantError(f"{path} has {size} bytes, expected {expected.bytes}: truncated, copy it again.")
        if record(path) != expected:
            raise StepquantError(f"{path} does not match its SHA-256: the checkpoint is damaged, copy it again.")
    listed = {folder / name for name in manifest.files}
    for path in folder.glob(f"{component or '*'}/**/*"):
        if path.is_file() and path not in listed:
            raise StepquantError(f"{path} is not part of the checkpoint: remove it, then load again.")


def check_link(path: Path, folder: Path) -> None:
    """Raise `StepquantError` if `path`, or a folder between it and `folder`, is a symbolic link.

    The hub's cache is an exception: there a file of ``snapshots/REVISION/`` is a link into ``blobs/`` beside it.
    """
    cache = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else None
    for part in (path, *path.parents):
        if part == folder or not part.is_relative_to(folder):
            break
        if part.is_symlink() and (cache is None or part != path or part.resolve().parent != cache.resolve()):
            raise StepquantError(f"{path} is a symbolic link, which a checkpoint must not hold: not loaded.")
