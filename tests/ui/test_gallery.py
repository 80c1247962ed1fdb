from __future__ import annotations

import pytest

from stepquant.errors import StepquantError
from stepquant.ui import gallery as module
from stepquant.ui.gallery import Gallery, Wanted


@pytest.fixture
def gallery(unconditional_folder, text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLES", 4)
    monkeypatch.setattr("stepquant.evaluation.compare.peak_memory_bytes", lambda *_: 123_000_000)
    return Gallery({"plain": str(unconditional_folder), "text": str(text_folder)}, tmp_path)


def test_a_model_is_quantized_once_and_drawn_beside_its_origin(gallery, tmp_path, monkeypatch):
    wanted = Wanted("plain", "minmax", "w8a8", steps=2, count=3)
    shown = gallery.show(wanted)
    assert shown.full_precision.size == shown.quantized.size == (130, 130)
    assert [path.name for path in tmp_path.iterdir()] == ["plain-minmax-w8a8-2"]
    rows = {what: (full, quantized) for what, full, quantized in shown.rows}
    assert rows["peak memory, whole process"] == ("123 MB", "123 MB")
    assert 20 < float(rows["PSNR to full precision, 3 images"][1].split()[0]) < 80

    monkeypatch.setattr("stepquant.quantize", None)  # would fail if it were called
    again = gallery.show(Wanted("plain", "minmax", "w8a8", seed=3, steps=2, count=3))
    assert again.full_precision.tobytes() != shown.full_precision.tobytes()


def test_a_prompt_is_drawn(gallery):
    images = [
        gallery.show(Wanted("text", "minmax", "w8a8", prompt, steps=1, count=1)).quantized.tobytes()
        for prompt in ("a b", "", "a b")
    ]
    assert images[0] == images[2] != images[1]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted("../elsewhere", "minmax", "w8a8"), "no model '../elsewhere'"),
        (Wanted("plain", "../magic", "w8a8"), "unknown recipe"),
        (Wanted("plain", "minmax", "../w8a8"), "not understood"),
        (Wanted("plain", "minmax", "w8a8", count=65), "expected 1 to 64"),
        (Wanted("plain", "minmax", "w8a8", steps=0), "steps is 0"),
        (Wanted("plain", "minmax", "w8a8", seed=-1), "seed is -1"),
    ],
)
def test_what_a_browser_may_send(gallery, wanted, message, tmp_path):
    with pytest.raises(StepquantError, match=message):
        gallery.show(wanted)
    assert not list(tmp_path.iterdir())
