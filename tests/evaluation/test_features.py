from __future__ import annotations

import pytest
import torch
from PIL import Image

from stepquant.errors import StepquantError
from stepquant.evaluation.features import DataImages, extract


class _Mean:
    """A feature: the mean of each channel. Counts its calls, and fails at one of them."""

    def __init__(self, key: str = "mean", fails_at: int = -1) -> None:
        self.key, self.fails_at, self.calls = key, fails_at, 0

    def __call__(self, images):
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        self.calls += 1
        return {"mean": images.mean(dim=(2, 3)), "max": images.amax(dim=(2, 3))}


def test_an_interrupted_extraction_resumes_from_the_cache(tmp_path):
    images = torch.rand(150, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = images.mean(dim=(2, 3))
    with pytest.raises(KeyboardInterrupt):
        extract(_Mean(fails_at=2), images, tmp_path)
    continued = _Mean()
    features = extract(continued, images, tmp_path)
    assert torch.equal(features["mean"], expected)
    assert features["max"].shape == (150, 1)
    assert continued.calls == 1, "two of the three batches were cached"

    again = _Mean()
    assert torch.equal(extract(again, images.clone(), tmp_path)["mean"], expected)
    assert again.calls == 0
    changed = images.clone()
    changed[0, 0, 0, 0] += 0.5
    assert not torch.equal(extract(again, changed, tmp_path)["mean"], expected)
    assert again.calls == 1
    other = _Mean(key="another network")
    extract(other, images, tmp_path)
    assert other.calls == 3


def test_a_folder_is_read_in_the_order_of_names(tmp_path):
    for name, code in (("b.png", 255), ("a.PNG", 0), ("c.jpg", 255)):
        Image.new("L", (6, 5), code).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    images = DataImages(tmp_path)
    assert len(images) == 3
    (batch,) = images
    assert batch.shape == (3, 3, 5, 6)
    assert batch.mean(dim=(1, 2, 3)).tolist() == pytest.approx([-1, 1, 1], abs=0.02)


def test_invalid_image_folders(tmp_path):
    with pytest.raises(StepquantError, match="is not a folder"):
        DataImages(tmp_path / "none")
    with pytest.raises(StepquantError, match="contains no images"):
        DataImages(tmp_path)
    Image.new("L", (6, 5)).save(tmp_path / "a.png")
    Image.new("L", (6, 4)).save(tmp_path / "b.png")
    with pytest.raises(StepquantError, match=r"b.png is 6 x 4 pixels; expected 6 x 5"):
        list(DataImages(tmp_path))
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(StepquantError, match=r"b.png cannot be read"):
        list(DataImages(tmp_path))
