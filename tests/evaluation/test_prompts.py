from __future__ import annotations

import json

import pytest

from stepquant.errors import StepquantError
from stepquant.evaluation.prompts import prompt_set


def test_parti_prompts_are_bundled():
    prompts = prompt_set("parti")
    assert len(prompts) == 1632
    assert prompts[0] == "bond"
    assert len(set(prompts)) > 1600
    assert any('called "The Rumbury Wanderers"' in prompt for prompt in prompts), "quotes belong to the prompt"


def test_coco_uses_the_first_caption_of_each_image(tmp_path):
    captions = [(7, "second  image\n"), (3, "first"), (7, "again"), (3, "once more")]
    annotations = [{"image_id": image, "id": place, "caption": text} for place, (image, text) in enumerate(captions)]
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"annotations": annotations}))
    assert prompt_set(str(path)) == ["first", "second image"]


def test_a_text_file(tmp_path):
    (tmp_path / "mine.txt").write_text("one\n\n two \n")
    assert prompt_set(str(tmp_path / "mine.txt")) == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "COCO captions"),
        ('{"images": []}', "COCO captions"),
        ('{"annotations": []}', "contains no caption"),
    ],
)
def test_a_json_file_without_captions(text, message, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(StepquantError, match=message):
        prompt_set(str(tmp_path / "a.json"))
    with pytest.raises(StepquantError, match="cannot be read"):
        prompt_set(str(tmp_path / "none.json"))
