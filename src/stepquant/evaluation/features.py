"""Features of many images: in batches, kept by content, continued where an interrupted run stopped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from stepquant.errors import StepquantError
from stepquant.progress import Progress
from stepquant.workspace import Workspace, digest, tensors_digest

BATCH_SIZE = 64
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class FeatureExtractor(Protocol):
    """A network that turns images into vectors.

    Attributes:
        key: stands for the network and its weights; kept features are valid under it.
    """

    key: str

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Name of a layer -> its vectors, float [N, D], of images float [N, C, H, W] in [-1, 1]."""
        ...


@dataclass(frozen=True)
class TensorPictures:
    """Images in memory, float [N, C, H, W] in [-1, 1]."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.images.split(BATCH_SIZE))


@dataclass(frozen=True)
class FolderPictures:
    """Image files of a folder, in the order of their names; read batch by batch, as float [N, 3, H, W] in [-1, 1].

    Raises:
        StepquantError: if there are none, or, while reading, for a file that is no image or of another size than
            the first: metrics of resized images measure the resizing.
    """

    folder: Path

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise StepquantError(f"there is no folder {self.folder}: give one with the images of the data.")
        if not self.files:
            raise StepquantError(f"{self.folder} holds no images: expected files that end in {', '.join(ENDINGS)}.")

    @property
    def files(self) -> list[Path]:
        return sorted(file for file in self.folder.iterdir() if file.suffix.lower() in ENDINGS)

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Tensor]:
        files, size = self.files, None
        for start in range(0, len(files), BATCH_SIZE):
            batch = []
            for file in files[start : start + BATCH_SIZE]:
                image = _read(file)
                size = size or image.shape
                if image.shape != size:
                    given, first = (f"{shape[2]} x {shape[1]}" for shape in (image.shape, size))
                    raise StepquantError(f"{file} is {given} and others are {first}: bring all to one size first.")
                batch.append(image)
            yield torch.stack(batch)


def _read(file: Path) -> Tensor:
    try:
        with Image.open(file) as image:
            codes = torch.from_numpy(np.array(image.convert("RGB")))
    except (OSError, UnidentifiedImageError) as error:
        raise StepquantError(f"image {file} cannot be read: {error}.") from None
    return codes.permute(2, 0, 1).float() / 127.5 - 1


def extract(
    extractor: FeatureExtractor,
    images: TensorPictures | FolderPictures,
    cache: Path | None = None,
    progress: Progress | None = None,
    description: str = "Extracting features",
) -> dict[str, Tensor]:
    """Features of all images, layer by layer: float32 [N, D].

    Args:
        cache: folder that keeps the features of each batch under a key of the images' content and the extractor:
            an interrupted extraction continues, and the same images are never passed through the network twice.
    """
    kept = None if cache is None else Workspace(cache)
    parts: list[dict[str, Tensor]] = []
    with (progress or Progress()).task(description, len(images)) as advance:
        for batch in images:
            stage = f"features-{digest([extractor.key, tensors_digest({'images': batch})])[:24]}"
            found = kept.load(stage) if kept else None
            if found is None:
                found = {name: layer.float() for name, layer in extractor(batch).items()}
                if kept:
                    kept.save(stage, found)
            parts.append(found)
            advance(len(batch))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
