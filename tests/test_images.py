from __future__ import annotations

import numpy
import pytest
import torch
from PIL import Image

from stepquant.errors import StepquantError
from stepquant.images import GAP, grid, save_image, side_by_side


def test_pixels_of_a_grid():
    images = torch.stack([torch.full((1, 64, 64), value) for value in (-1.0, 0.0, 1.0)])
    sheet = numpy.asarray(grid(images))
    assert sheet.shape == (128 + GAP, 128 + GAP, 3)
    assert sheet[:64, :64].max() == 0
    assert set(numpy.unique(sheet[:64, 64 + GAP :])) <= {127, 128}
    assert sheet[64:, 64:].min() == 255  # the empty fourth place
    assert sheet[64 + GAP :, :64].min() == 255


def test_small_images_are_enlarged_by_an_integer_factor():
    image = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).reshape(1, 1, 2, 2).repeat_interleave(12, 2)
    image = image.repeat_interleave(12, 3)  # 24 x 24: enlarged three times
    sheet = numpy.asarray(grid(image))
    assert sheet.shape[:2] == (72, 72)
    assert sheet[:36, :36].max() == 0
    assert sheet[:36, 36:].min() == 255


def test_side_by_side_contains_both_grids(tmp_path):
    black, white = -torch.ones(4, 3, 64, 64), torch.ones(4, 3, 64, 64)
    whole = side_by_side(black, white, ("left", "right"))
    save_image(whole, tmp_path / "new" / "a.png")
    with Image.open(tmp_path / "new" / "a.png") as read:
        assert read.size == whole.size
        assert read.getpixel((10, 60)) == (0, 0, 0)
        assert read.getpixel((whole.width - 10, 60)) == (255, 255, 255)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_file_name_without_an_image_format_is_rejected(tmp_path):
    with pytest.raises(StepquantError, match=r"\.png"):
        save_image(grid(torch.zeros(1, 1, 8, 8)), tmp_path / "grid.txt")
