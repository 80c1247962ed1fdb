"""Features of many images: extracted in batches, cached by content, resumed after an interruption."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepquant.errors import StepquantError
from stepquant.files import digest, tensors_digest
from stepquant.progress import Progress
from stepquant.workspace import Workspace

BATCH_SIZE = 64
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class FeatureExtractor(Protocol):
    """A network that turns images into vectors.

    Attributes:
        key: identifier of the network and its weights; cached features are valid under it.
    """

    key: str

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Return name of a layer -> its vectors, float [N, D], of images float [N, C, H, W] in [-1, 1]."""
        ...


@dataclass(frozen=True)
class DataImages:
    """The image files of a folder in the order of their names, as batches float [N, 3, H, W] in [-1, 1].

    Raises:
        StepquantError: if there are none, or, while iterating, for an unreadable file or one of another size than the
            first: metrics of resized images measure the resizing.
    """

    folder: Path

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise StepquantError(f"{self.folder} is not a folder; expected one with images of the data.")
        if not self.files:
            raise StepquantError(f"{self.folder} contains no images; expected files that end in {', '.join(SUFFIXES)}.")

    @property
    def files(self) -> list[Path]:
        return sorted(file for file in self.folder.iterdir() if file.suffix.lower() in SUFFIXES)

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
                    actual, expected = (f"{shape[2]} x {shape[1]}" for shape in (image.shape, size))
                    raise StepquantError(
                        f"{file} is {actual} pixels; expected {expected} like the other images. "
                        "Resize all images to one size."
                    )
                batch.append(image)
            yield torch.stack(batch)


def _read(file: Path) -> Tensor:
    try:
        with Image.open(file) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
    except OSError as error:  # UnidentifiedImageError is one
        raise StepquantError(f"image {file} cannot be read: {error}.") from None
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def extract(
    extractor: FeatureExtractor,
    images: Tensor | DataImages,
    cache: Path | None = None,
    progress: Progress | None = None,
    description: str = "Extracting features",
) -> dict[str, Tensor]:
    """Extract the features of all images.

    Args:
        images: float [N, C, H, W] in [-1, 1], or a folder of them.
        cache: folder for the features of each batch, under a key of its content and the extractor: an interrupted
            extraction continues, and no image passes through the same network twice.

    Returns:
        Name of a layer -> its vectors, float32 [N, D].
    """
    workspace = None if cache is None else Workspace(cache)
    batches: Iterable[Tensor] = images.split(BATCH_SIZE) if isinstance(images, Tensor) else images
    parts: list[dict[str, Tensor]] = []
    with (progress or Progress()).task(description, len(images)) as advance:
        for batch in batches:
            stage = f"features-{digest([extractor.key, tensors_digest({'images': batch})])[:24]}"
            features = workspace.load(stage) if workspace else None
            if features is None:
                features = {name: layer.float() for name, layer in extractor(batch).items()}
                if workspace:
                    workspace.save(stage, features)
            parts.append(features)
            advance(len(batch))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
