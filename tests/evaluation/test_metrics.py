from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import stepquant
from stepquant.cli.main import app
from stepquant.errors import StepquantError
from stepquant.evaluation.features import FolderPictures
from stepquant.evaluation.metrics import Judged, check_wanted, measure

REWARD = """
import torch
def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3)) + len(prompts)
def short(images, prompts):
    return [1.0]
"""


def _pictures(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for index, image in enumerate(_pictures(80, 9)):
        codes = ((image[0] + 1) * 127.5).round().to(torch.uint8)
        Image.fromarray(codes.numpy()).save(folder / f"{index:03}.png")
    return folder


def test_the_classifiers_proxies(data, tmp_path):
    full, images = _pictures(40, 1), (_pictures(40, 1) * 0.2)
    judged = Judged("zoo:fashion-ddpm", images, full, data=FolderPictures(data), cache=tmp_path / "cache")
    figures = measure({"classifier": ""}, judged)
    assert set(figures) == {
        f"classifier_{name}" for name in ("frechet", "kernel_distance", "precision", "recall", "score")
    }
    frechet = figures["classifier_frechet"]
    assert (frechet.count, frechet.data_count) == (40, 80)
    assert "fewer images than the 64 dimensions" in (frechet.note or "")
    # The noise of full precision is that of the data; the washed out one is not.
    assert frechet.value > 2 * (frechet.full_precision or 0)
    assert figures["classifier_kernel_distance"].value > 2 * abs(
        figures["classifier_kernel_distance"].full_precision or 0
    )
    assert len(list((tmp_path / "cache").glob("features-*"))) == 4
    with pytest.raises(StepquantError, match="no classifier for the data of somewhere"):
        measure({"classifier": ""}, Judged("somewhere", images, full, data=FolderPictures(data)))


def test_a_reward_of_ones_own(tmp_path):
    (tmp_path / "own.py").write_text(REWARD)
    full = torch.zeros(8, 1, 16, 16)
    judged = Judged("model", full + torch.linspace(0, 0.7, 8)[:, None, None, None], full, prompts=["a"] * 8)
    figure = measure({"reward": f"{tmp_path / 'own.py'}:brightness"}, judged)["reward"]
    assert (figure.value, figure.full_precision, figure.count) == (pytest.approx(8.35), 8, 8)
    low, high = figure.interval
    assert 8 < low < 8.35 < high < 8.7
    with pytest.raises(StepquantError, match="1 scores for 8 images"):
        measure({"reward": f"{tmp_path / 'own.py'}:short"}, judged)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"beauty": ""}, "no metric 'beauty'"),
        ({"inception": ""}, "with --data"),
        ({"clip": ""}, "metric clip needs a path"),
        ({"lpips": "/no/such/file"}, "nothing at /no/such/file"),
        ({"reward": "none.py:f"}, "no reward file"),
    ],
)
def test_what_a_metric_lacks_is_told_before_anything_is_drawn(wanted, message):
    with pytest.raises(StepquantError, match=message):
        check_wanted(wanted, None)


def test_evaluate_takes_them(unconditional_pipeline, unconditional_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("stepquant.evaluation.compare.peak_memory_bytes", lambda *_: 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(REWARD)
    small = stepquant.Calibration(samples=2, steps=1)
    folder = tmp_path / "model"
    stepquant.save(stepquant.quantize(unconditional_pipeline, "w8a8", recipe="minmax", calibration=small), folder)
    command = ["evaluate", str(folder), "--against", str(unconditional_folder), "--count", "3", "--steps", "1"]

    result = CliRunner().invoke(app, [*command, "--with", "reward=own.py:brightness", "--json", "f.json"])
    assert result.exit_code == 0, result.output
    row = next(line for line in result.stdout.splitlines() if "reward" in line)
    figures = json.loads((tmp_path / "f.json").read_text())
    figure = figures["metrics"]["reward"]
    assert f"{figure['value']:.4g}" in row
    assert " 3 " in row
    assert figures["psnr_db_interval"][0] <= figures["psnr_db"] <= figures["psnr_db_interval"][1]
    assert "inception: FID" in CliRunner().invoke(app, [*command, "--with", "help"]).stdout

    (tmp_path / "empty").mkdir()
    for wrong, message in (
        (["--with", "beauty=1"], "no metric 'beauty'"),
        (["--with", "classifier", "--data", "empty"], "holds no images"),
        (["--prompts", "parti"], "a prompt was given"),
    ):
        result = CliRunner().invoke(app, [*command, *wrong])
        assert result.exit_code == 2, result.output
        assert message in result.stderr
