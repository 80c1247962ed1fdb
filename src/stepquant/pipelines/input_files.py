"""Inputs of a pipeline's call from a JSON file: numbers and texts, and paths of images, frames and arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stepquant.errors import StepquantError, first_line

ARRAY = ".npy"
"""Suffix of a file with an array, which becomes a tensor: embeddings, audio."""


def read_inputs(path: Path) -> dict[str, Any] | list[dict[str, Any]]:
    """Read the inputs in a JSON file: a dictionary that all samples share, or a list with one per sample.

    A text that ends like an image file is read as an image, one that ends in ``.npy`` as a tensor; lists of them are
    the frames of a video. Paths are relative to the folder of the JSON file.

    Raises:
        StepquantError: if a file is missing or cannot be read, or the JSON holds something else.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StepquantError(f"inputs file {path} cannot be read as JSON: {first_line(error)}.") from None
    rows = given if isinstance(given, list) else [given]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise StepquantError(
            f"inputs file {path} holds {type(given).__name__}; expected an object of arguments of the pipeline's call, "
            "or a list with one such object per sample."
        )
    read: list[dict[str, Any]] = [{name: _read(value, path.parent) for name, value in row.items()} for row in rows]
    return read if isinstance(given, list) else read[0]


def _read(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_read(entry, folder) for entry in value]
    if not isinstance(value, str):
        return value
    suffix = Path(value).suffix.lower()
    if suffix != ARRAY and suffix not in Image.registered_extensions():
        return value
    path = folder / value
    try:
        return torch.from_numpy(np.load(path)) if suffix == ARRAY else Image.open(path).convert(_mode(path))
    except (OSError, ValueError) as error:
        raise StepquantError(f"input file {path} cannot be read: {first_line(error)}.") from None


def _mode(path: Path) -> str:
    """Mode of an image for pipelines: gray for a mask in shades of gray, else RGB."""
    with Image.open(path) as image:
        return "L" if image.mode in ("1", "L") else "RGB"
