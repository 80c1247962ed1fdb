"""Inputs from a JSON file; whatever is wrong with it is one sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from stepquant.errors import StepquantError
from stepquant.pipelines.input_files import read_inputs


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    Image.new("L", (4, 4), 255).save(tmp_path / "mask.PNG")
    np.save(tmp_path / "embeds.npy", np.ones((1, 3), np.float32))
    return tmp_path


def written(folder, value):
    (folder / "inputs.json").write_text(json.dumps(value))
    return folder / "inputs.json"


def test_values_images_frames_and_arrays(folder):
    given = {
        "image": "red.png", "mask_image": "mask.PNG", "video": ["red.png", "red.png"], "image_embeds": "embeds.npy",
        "negative_prompt": "red.", "num_frames": 9,
    }  # fmt: skip
    read = read_inputs(written(folder, given))
    assert read["image"].getpixel((0, 0)) == (255, 0, 0) and read["mask_image"].getpixel((0, 0)) == 255
    assert [frame.size for frame in read["video"]] == [(4, 4), (4, 4)]
    assert torch.equal(read["image_embeds"], torch.ones(1, 3))
    assert (read["negative_prompt"], read["num_frames"]) == ("red.", 9)


def test_a_list_holds_one_dictionary_per_sample(folder):
    read = read_inputs(written(folder, [{"image": "red.png"}, {"image": "mask.PNG"}]))
    assert [row["image"].mode for row in read] == ["RGB", "L"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"image": "missing.png"}, r"input file .*missing\.png cannot be read"),
        ({"image": "inputs.npy"}, r"input file .*inputs\.npy cannot be read"),
        ("red.png", "holds str; expected an object of arguments"),
        ([], "holds list; expected"),
        ([1], "holds list; expected"),
    ],
)
def test_what_cannot_be_read_is_refused(folder, value, message):
    (folder / "inputs.npy").write_text("no array")
    with pytest.raises(StepquantError, match=message):
        read_inputs(written(folder, value))


def test_a_file_that_is_not_json(folder):
    (folder / "inputs.json").write_text("{")
    with pytest.raises(StepquantError, match=r"inputs\.json cannot be read as JSON"):
        read_inputs(folder / "inputs.json")
