import json
import math

import pytest
import torch
from PIL import Image

from stepquant.calibration.image_folder import open_images
from stepquant.errors import StepquantError


def image(path, mode="RGB", size=(16, 16), colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_images_are_scaled_center_cropped_and_converted(unconditional_pipeline, tmp_path):
    wide = Image.new("RGB", (64, 32), "black")
    wide.paste("white", (16, 0, 48, 32))  # the middle square
    wide.save(tmp_path / "a.png")
    image(tmp_path / "deep" / "b.jpg", "L", (16, 16), 128)
    (tmp_path / "notes.txt").write_text("no image")
    images = open_images(tmp_path, unconditional_pipeline)
    assert len(images) == 2 and images.conditions == ()
    read = images.read([0, 1])
    assert read.shape == (2, 1, 16, 16) and read.dtype == torch.float32
    assert float(read[0, :, :, 2:-2].min()) > 0.9, "the black sides are cut off"
    assert math.isclose(float(read[1].mean()), 128 / 127.5 - 1, abs_tol=0.02)


def test_classes_are_subfolders_by_name_or_number(class_pipeline, tmp_path):
    image(tmp_path / "class 3" / "a.png")
    image(tmp_path / "7" / "b.png")
    images = open_images(tmp_path, class_pipeline)
    labels = {path.name: label for path, label in zip(images.paths, images.conditions, strict=True)}
    assert labels == {"a.png": 3, "b.png": 7}
    assert images.size == (16, 16) and images.channels == 3, "of the decoded image, not of the latent"
    image(tmp_path / "loose.png")
    with pytest.raises(StepquantError, match=r"loose\.png has no class; expected a subfolder"):
        open_images(tmp_path, class_pipeline)
    (tmp_path / "loose.png").unlink()
    image(tmp_path / "10" / "c.png")
    with pytest.raises(StepquantError, match="has no class"):
        open_images(tmp_path, class_pipeline)


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_captions_come_from_the_metadata_file(name, text_pipeline, tmp_path):
    image(tmp_path / "a.png")
    image(tmp_path / "b.png")
    rows = [("a.png", "a cat, sitting"), ("b.png", "dog")]
    if name.endswith("jsonl"):
        lines = [json.dumps({"file_name": file, "text": text}) for file, text in rows]
    else:
        lines = ["file_name,text", *(f'{file},"{text}"' for file, text in rows)]
    (tmp_path / name).write_text("\n".join(lines))
    images = open_images(tmp_path, text_pipeline)
    assert images.conditions == ("a cat, sitting", "dog")
    assert [path.name for path in images.paths] == ["a.png", "b.png"]


def test_invalid_folders(unconditional_pipeline, text_pipeline, tmp_path):
    with pytest.raises(StepquantError, match="is not a folder"):
        open_images(tmp_path / "nowhere", unconditional_pipeline)
    with pytest.raises(StepquantError, match=r"no captions; expected a metadata\.jsonl"):
        open_images(tmp_path, text_pipeline)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}')
    with pytest.raises(StepquantError, match="expected the fields file_name and text"):
        open_images(tmp_path, text_pipeline)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "cat"}')
    with pytest.raises(StepquantError, match="does not exist"):
        open_images(tmp_path, text_pipeline)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n but no more")
    with pytest.raises(StepquantError, match=r"bad\.png cannot be read"):
        open_images(tmp_path, unconditional_pipeline).read([0])


def test_the_key_follows_the_files(unconditional_pipeline, tmp_path):
    image(tmp_path / "a.png")
    before = open_images(tmp_path, unconditional_pipeline).key()
    assert open_images(tmp_path, unconditional_pipeline).key() == before
    image(tmp_path / "b.png")
    assert open_images(tmp_path, unconditional_pipeline).key() != before
