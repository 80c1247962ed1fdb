"""Images as files: a grid, and two grids side by side."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from stepquant.errors import StepquantError
from stepquant.files import write_atomic

GAP = 2
"""Pixels between the images of a grid."""
SMALLEST_SIDE = 64
"""Smaller images are enlarged by a whole factor up to at least this many pixels."""
CAPTION_HEIGHT = 20


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """A grid of images, float [N, C, H, W] in [-1, 1] with C of 1 or 3; as square as N allows, filled row by row."""
    count, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    factor = max(1, math.ceil(SMALLEST_SIDE / min(height, width)))
    codes = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    codes = codes.expand(-1, 3, -1, -1).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    height, width = height * factor + GAP, width * factor + GAP
    sheet = Image.new("RGB", (columns * width - GAP, math.ceil(count / columns) * height - GAP), "white")
    for index, image in enumerate(codes):
        place = (index % columns * width, index // columns * height)
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), place)
    return sheet


def side_by_side(left: Tensor, right: Tensor, captions: tuple[str, str]) -> Image.Image:
    """Two grids of equally many images beside each other, each under its caption."""
    sheets = [grid(left), grid(right)]
    gap = 8 * GAP
    whole = Image.new("RGB", (sum(sheet.width for sheet in sheets) + gap, sheets[0].height + CAPTION_HEIGHT), "white")
    pen = ImageDraw.Draw(whole)
    for sheet, caption, offset in zip(sheets, captions, (0, sheets[0].width + gap), strict=True):
        pen.text((offset + GAP, GAP), caption, fill="black", font_size=14)
        whole.paste(sheet, (offset, CAPTION_HEIGHT))
    return whole


def image_format(path: Path) -> str:
    """The file format that a path's ending stands for; raises `StepquantError` for an ending of no image."""
    known = {ending: name for ending, name in Image.registered_extensions().items() if name in Image.SAVE}
    if path.suffix.lower() not in known:
        raise StepquantError(f"images cannot be written to {path}: expected a file name that ends in .png.")
    return known[path.suffix.lower()]


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image whole or not at all; raises `StepquantError` where that is impossible."""
    name = image_format(path)
    write_atomic(path, lambda draft: image.save(draft, format=name))
