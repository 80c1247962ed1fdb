"""Image files: a grid of images, and two grids side by side."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from stepquant.errors import StepquantError
from stepquant.files import write_atomic

GAP = 2
"""Pixels between the images of a grid."""
SMALLEST_SIDE = 64
"""Smaller images are enlarged by an integer factor to at least this many pixels."""
CAPTION_HEIGHT = 20


def stills(samples: Tensor, name: str = "the pipeline") -> Tensor:
    """Return images float [N, C, H, W] of samples: of video [N, C, F, H, W] the middle frame.

    Args:
        name: of the model that generated them, for the message.

    Raises:
        StepquantError: for audio and latents, which cannot be shown.
    """
    if samples.dim() == 5:
        samples = samples[:, :, samples.shape[2] // 2]
    if samples.dim() != 4 or samples.shape[1] not in (1, 3, 4):
        raise StepquantError(
            f"{name} generates samples of the shape {list(samples.shape[1:])}; expected images or video. Only "
            "`stepquant evaluate` compares other samples."
        )
    return samples[:, :3]


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """Return a grid of images, float [N, C, H, W] in [-1, 1] with C of 1 or 3, in rows; square by default."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    factor = max(1, math.ceil(SMALLEST_SIDE / min(images.shape[2:])))
    codes = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
    tiles = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in codes]
    tiles = [ImageOps.scale(tile, factor, Image.Resampling.NEAREST) for tile in tiles]
    tiles = [ImageOps.expand(tile, (0, 0, GAP, GAP), "white") for tile in tiles]
    tiles += [Image.new("RGB", tiles[0].size, "white")] * (rows * columns - len(tiles))
    sheet = make_image_grid(tiles, rows, columns)
    return sheet.crop((0, 0, sheet.width - GAP, sheet.height - GAP))


def side_by_side(left: Tensor, right: Tensor, captions: tuple[str, str]) -> Image.Image:
    """Return two grids of the same number of images next to each other, each below its caption."""
    sheets = []
    for images, caption in zip((left, right), captions, strict=True):
        sheet = ImageOps.expand(grid(images), (0, CAPTION_HEIGHT, 8 * GAP, 0), "white")
        ImageDraw.Draw(sheet).text((GAP, GAP), caption, fill="black", font_size=14)
        sheets.append(sheet)
    both = make_image_grid(sheets, 1, 2)
    return both.crop((0, 0, both.width - 8 * GAP, both.height))


def image_format(path: Path) -> str:
    """Return the image format for the suffix of a path; raises `StepquantError` for an unknown one."""
    known = {ending: name for ending, name in Image.registered_extensions().items() if name in Image.SAVE}
    if path.suffix.lower() not in known:
        raise StepquantError(f"image file {path} has an unknown format; expected a file name that ends in .png.")
    return known[path.suffix.lower()]


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image file completely or not at all; raises `StepquantError` if that is impossible."""
    name = image_format(path)
    write_atomic(path, lambda draft: image.save(draft, format=name))
