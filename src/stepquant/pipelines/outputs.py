"""What a pipeline returns as one tensor, whatever its medium."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepquant.errors import StepquantError

FIELDS = ("images", "image", "frames", "videos", "video", "audios", "audio")
"""Fields of a pipeline's output that hold samples; of any other output the first field counts."""
CHANNELS = 4
"""Most channels of an image, by which channels last are recognized."""


def samples_of(output: Any) -> Tensor:
    """Return the samples of a pipeline's output: float32.

    Images [N, C, H, W] and video [N, C, F, H, W] are in [-1, 1], and audio [N, C, L] is as the pipeline scales it.
    Latents and embeddings, which pipelines return as tensors, keep their shape.

    Raises:
        StepquantError: if the output holds samples of different shapes, or none.
    """
    field, value = _samples_in(output)
    stacked = _stacked(value)
    if isinstance(stacked, Tensor):
        return stacked.float()
    tensor = torch.from_numpy(stacked)
    tensor = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    if field in ("audios", "audio"):
        return tensor[:, None] if tensor.dim() == 2 else tensor
    if tensor.dim() in (4, 5) and tensor.shape[-1] <= CHANNELS:
        return tensor.movedim(-1, 1) * 2 - 1
    return tensor


def _samples_in(output: Any) -> tuple[str, Any]:
    fields = dict(output) if isinstance(output, Mapping) else {}
    for name in FIELDS:
        if fields.get(name) is not None:
            return name, fields[name]
    values = list(fields.values()) or (list(output) if isinstance(output, tuple) else [output])
    return "", values[0]


def _stacked(value: Any) -> Tensor | np.ndarray[Any, Any]:
    """Stack nested lists of images, arrays or tensors."""
    if isinstance(value, Tensor | np.ndarray):
        return value
    if isinstance(value, Image.Image):
        return np.atleast_3d(np.asarray(value if value.mode in ("L", "RGBA") else value.convert("RGB")))
    if not isinstance(value, list | tuple) or not value:
        raise StepquantError(
            f"the pipeline returned {type(value).__name__}; expected images, frames or audio as arrays or tensors."
        )
    parts = [_stacked(part) for part in value]
    shapes = sorted({tuple(part.shape) for part in parts})
    if len(shapes) > 1:
        raise StepquantError(
            f"the pipeline returned samples of the shapes {shapes[0]} and {shapes[1]}; expected one shape. Give "
            "inputs of equal sizes."
        )
    if isinstance(parts[0], Tensor):
        return torch.stack([torch.as_tensor(part) for part in parts])
    return np.stack([np.asarray(part) for part in parts])
