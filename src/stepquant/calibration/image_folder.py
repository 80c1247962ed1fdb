"""A folder of images to train on, with labels from subfolders or captions from a metadata file.

Written by hand because no library fits: ``torchvision.datasets.ImageFolder`` numbers classes by sorted folder names
instead of the model's labels and reads no captions, and every torchvision release is bound to one torch release;
``datasets`` has the metadata file but requires pyarrow and pandas. Decoding, scaling and cropping are Pillow's.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from stepquant.errors import StepquantError
from stepquant.files import digest
from stepquant.models import denoiser_name
from stepquant.pipelines.call import kind_of

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = ("metadata.jsonl", "metadata.csv")
"""Files with the fields ``file_name`` and ``text``, the format of image folders in Hugging Face datasets."""


@dataclass(frozen=True)
class ImageFolder:
    """Images for one pipeline, read on demand.

    Attributes:
        folder: that was searched.
        paths: of the image files.
        conditions: label or caption of each image; empty for an unconditional model.
        size: height and width that images are scaled and center-cropped to.
        channels: 1 or 3.
    """

    folder: Path
    paths: tuple[Path, ...]
    conditions: tuple[int | str, ...]
    size: tuple[int, int]
    channels: int

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Read images: float32 [B, C, H, W] in [-1, 1]; raises `StepquantError` for a file that is not an image."""
        return torch.stack([self._read(self.paths[index]) for index in indices])

    def key(self) -> str:
        """Digest of the names, sizes and modification times of the files, their conditions, and the image size."""
        files = []
        for path in self.paths:
            stat = path.stat()
            files.append([path.relative_to(self.folder).as_posix(), stat.st_size, stat.st_mtime_ns])
        return digest([files, list(self.conditions), list(self.size), self.channels])

    def _read(self, path: Path) -> Tensor:
        height, width = self.size
        try:
            with Image.open(path) as file:
                image = file.convert("L" if self.channels == 1 else "RGB")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise StepquantError(f"image {path} cannot be read ({error}). Replace or remove it.") from None
        image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).reshape(height, width, self.channels)
        return pixels.permute(2, 0, 1) / 127.5 - 1


def open_images(folder: Path | str, pipeline: Any) -> ImageFolder:
    """List the images in `folder` and its subfolders for training `pipeline`.

    A class-conditional model needs a subfolder for each class, called by the name or number of the class. A
    text-conditional model needs a `METADATA` file with a caption for each image.

    Raises:
        StepquantError: without images, for an image without a known class, and without captions.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StepquantError(f"data {folder} is not a folder; expected a folder of images.")
    kind = kind_of(pipeline)
    if kind == "text":
        described = _captions(folder)
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
        described = dict.fromkeys(paths) if kind == "unconditional" else _labels(folder, paths, pipeline)
    if not described:
        raise StepquantError(f"data {folder} holds no images; expected files that end in {', '.join(ENDINGS)}.")
    conditions = () if kind == "unconditional" else tuple(described.values())
    size, channels = _shape(pipeline)
    if channels not in (1, 3):
        raise StepquantError(
            f"the model has {channels} channels; expected 1 or 3 to train on images. Use distill=True."
        )
    return ImageFolder(folder, tuple(described), conditions, size, channels)


def _labels(folder: Path, paths: list[Path], pipeline: Any) -> dict[Path, Any]:
    named = dict(getattr(pipeline, "labels", None) or {})
    known = set(named.values()) or set(range(pipeline.transformer.config.num_embeds_ada_norm))
    labels: dict[Path, Any] = {}
    for path in paths:
        name = path.relative_to(folder).parts[0]
        label = named.get(name, int(name) if name.isdecimal() else None)
        if label not in known or path.parent == folder:
            examples = ", ".join([f"{name!r}" for name in list(named)[:3]] or ["0"])
            raise StepquantError(
                f"image {path} has no class; expected a subfolder of {folder} with the name or number of the class, "
                f"such as {examples}. Move it there."
            )
        labels[path] = label
    return labels


def _captions(folder: Path) -> dict[Path, Any]:
    source = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if source is None:
        raise StepquantError(
            f"data {folder} has no captions; expected a {METADATA[0]} in it, "
            "each line an object with file_name and text."
        )
    captions: dict[Path, Any] = {}
    try:
        text = source.read_text(encoding="utf-8")
        rows = list(csv.DictReader(text.splitlines())) if source.suffix == ".csv" else list(_objects(text))
        for row in rows:
            captions[folder / row["file_name"]] = str(row["text"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StepquantError(
            f"captions {source} cannot be read ({type(error).__name__}: {error}); "
            "expected the fields file_name and text for each image."
        ) from None
    for path in captions:
        if not path.is_file():
            raise StepquantError(f"captions {source} name {path}, which does not exist. Remove or correct the line.")
    return captions


def _objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _shape(pipeline: Any) -> tuple[tuple[int, int], int]:
    """Height and width, and channels, of the images that a pipeline generates."""
    config = getattr(pipeline, denoiser_name(pipeline)).config
    sample = config.sample_size
    height, width = sample if isinstance(sample, (tuple, list)) else (sample, sample)
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        return (height, width), config.in_channels
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return (height * factor, width * factor), vae.config.in_channels
