from __future__ import annotations

import pytest

from stepquant.errors import StepquantError
from stepquant.ui import gallery as module
from stepquant.ui.gallery import Gallery, Job


@pytest.fixture
def gallery(unconditional_folder, text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLES", 4)
    monkeypatch.setattr("stepquant.evaluation.compare.peak_memory_bytes", lambda *_: 123_000_000)
    return Gallery({"plain": str(unconditional_folder), "text": str(text_folder)}, tmp_path)


def test_a_model_is_quantized_once_and_compared_with_its_source(gallery, tmp_path, monkeypatch):
    job = Job("plain", "minmax", "w8a8", steps=2, count=3)
    result = gallery.run(job)
    assert result.full_precision.size == result.quantized.size == (130, 130)
    assert [path.name for path in tmp_path.iterdir()] == ["plain-minmax-w8a8-2"]
    rows = {name: (full, quantized) for name, full, quantized in result.rows}
    assert rows["peak memory, whole process"] == ("123 MB", "123 MB")
    assert 20 < float(rows["PSNR to full precision, 3 images"][1].split()[0]) < 80

    monkeypatch.setattr("stepquant.quantize", None)  # would fail if it were called
    again = gallery.run(Job("plain", "minmax", "w8a8", seed=3, steps=2, count=3))
    assert again.full_precision.tobytes() != result.full_precision.tobytes()


def test_a_prompt_is_used(gallery):
    images = [
        gallery.run(Job("text", "minmax", "w8a8", prompt, steps=1, count=1)).quantized.tobytes()
        for prompt in ("a b", "", "a b")
    ]
    assert images[0] == images[2] != images[1]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job("../elsewhere", "minmax", "w8a8"), "model '../elsewhere' does not exist"),
        (Job("plain", "../magic", "w8a8"), "recipe '../magic' does not exist"),
        (Job("plain", "minmax", "../w8a8"), "not understood"),
        (Job("plain", "minmax", "w8a8", count=65), "expected 1 to 64"),
        (Job("plain", "minmax", "w8a8", steps=0), "steps is 0"),
        (Job("plain", "minmax", "w8a8", seed=-1), "seed is -1"),
    ],
)
def test_invalid_requests_of_a_browser_are_rejected(gallery, job, message, tmp_path):
    with pytest.raises(StepquantError, match=message):
        gallery.run(job)
    assert not list(tmp_path.iterdir())


def test_a_browser_cannot_run_a_recipe_file(gallery, tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\n")
    with pytest.raises(StepquantError, match="does not exist"):
        gallery.run(Job("plain", f"{folder / 'code.py'}:Recipe", "w8a8"))
    assert not (folder / "ran").exists()
