"""A folder of images to train on, with labels by subfolder or captions for a model that has conditions."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from stepquant.errors import StepquantError
from stepquant.files import digest
from stepquant.models import denoiser_name
from stepquant.pipelines.request import kind_of

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
METADATA = ("metadata.jsonl", "metadata.csv")
"""Files with the fields ``file_name`` and ``text``, as the image folders of Hugging Face datasets have them."""


@dataclass(frozen=True)
class ImageFolder:
    """Images that fit a pipeline, read when they are needed.

    Attributes:
        paths: of the files.
        conditions: a label or a caption for each; empty for an unconditional model.
        size: height and width that images are brought to: scaled, and cut to the middle.
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
        """float32 [N, C, H, W] in [-1, 1]; raises `StepquantError` naming a file that is no image."""
        return torch.stack([self._read(self.paths[index]) for index in indices])

    def key(self) -> str:
        """Stands for names, sizes and ages of the files, what they are conditioned on, and how they are read."""
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
            raise StepquantError(f"image {path} cannot be read ({error}): replace or remove it.") from None
        factor = max(height / image.height, width / image.width)
        if (image.height, image.width) != (height, width):
            scaled = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
            left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
            image = image.resize(scaled, Image.Resampling.LANCZOS)
            image = image.crop((left, top, left + width, top + height))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).reshape(height, width, self.channels)
        return pixels.permute(2, 0, 1) / 127.5 - 1


def open_images(folder: Path | str, pipeline: Any) -> ImageFolder:
    """The images in `folder`, for training `pipeline`.

    Subfolders are searched too. For a model of classes, each class has a subfolder with its name or number; for a model
    of text, a `METADATA` file gives a caption for each image.

    Raises:
        StepquantError: if there is no image, one of no class that the model knows, or no caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StepquantError(f"data {folder} is no folder: give one that holds images.")
    kind = kind_of(pipeline)
    if kind == "text":
        described = _captions(folder)
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
        described = dict.fromkeys(paths) if kind == "unconditional" else _labels(folder, paths, pipeline)
    if not described:
        raise StepquantError(f"data {folder} holds no images: expected files that end in {', '.join(ENDINGS)}.")
    conditions = () if kind == "unconditional" else tuple(described.values())
    size, channels = _shape(pipeline)
    if channels not in (1, 3):
        raise StepquantError(f"the model draws {channels} channels, which are no images: train it by distillation.")
    return ImageFolder(folder, tuple(described), conditions, size, channels)


def _labels(folder: Path, paths: list[Path], pipeline: Any) -> dict[Path, Any]:
    named = dict(getattr(pipeline, "labels", None) or {})
    known = set(named.values()) or set(range(pipeline.transformer.config.num_embeds_ada_norm))
    labels: dict[Path, Any] = {}
    for path in paths:
        name = path.relative_to(folder).parts[0]
        label = named.get(name, int(name) if name.isdecimal() else None)
        if label not in known or path.parent == folder:
            expected = ", ".join([f"{name!r}" for name in list(named)[:3]] or ["0"])
            raise StepquantError(
                f"image {path} has no class: put the images of each class in a subfolder of {folder} "
                f"that is called as the class is, {expected} and so on, or as its number."
            )
        labels[path] = label
    return labels


def _captions(folder: Path) -> dict[Path, Any]:
    source = next((folder / name for name in METADATA if (folder / name).is_file()), None)
    if source is None:
        raise StepquantError(
            f"data {folder} has no captions: expected a {METADATA[0]} in it, "
            "each line an object with file_name and text."
        )
    captions: dict[Path, Any] = {}
    try:
        text = source.read_text()
        rows = list(csv.DictReader(text.splitlines())) if source.suffix == ".csv" else list(_objects(text))
        for row in rows:
            captions[folder / row["file_name"]] = str(row["text"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StepquantError(
            f"captions {source} cannot be read ({type(error).__name__}: {error}): "
            "expected the fields file_name and text for each image."
        ) from None
    for path in captions:
        if not path.is_file():
            raise StepquantError(f"captions {source} name {path}, which does not exist: remove or correct the line.")
    return captions


def _objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _shape(pipeline: Any) -> tuple[tuple[int, int], int]:
    """Height and width, and channels, of the images that a pipeline draws."""
    config = getattr(pipeline, denoiser_name(pipeline)).config
    sample = config.sample_size
    height, width = sample if isinstance(sample, (tuple, list)) else (sample, sample)
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        return (height, width), config.in_channels
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return (height * factor, width * factor), vae.config.in_channels
