from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import stepquant
from stepquant.cli.main import app
from stepquant.errors import StepquantError
from stepquant.evaluation.features import DataImages
from stepquant.evaluation.metrics import MetricInputs, check_metrics, measure

REWARD = """
import torch
def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3)) + len(prompts)
def short(images, prompts):
    return [1.0]
"""


def _images(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for index, image in enumerate(_images(80, 9)):
        codes = ((image[0] + 1) * 127.5).round().to(torch.uint8)
        Image.fromarray(codes.numpy()).save(folder / f"{index:03}.png")
    return folder


def test_classifier_proxies(data, tmp_path):
    full, images = _images(40, 1), (_images(40, 1) * 0.2)
    inputs = MetricInputs("zoo:fashion-ddpm", images, full, data=DataImages(data), cache=tmp_path / "cache")
    values = measure({"classifier": ""}, inputs)
    assert set(values) == {
        f"classifier_{name}" for name in ("frechet", "kernel_distance", "precision", "recall", "score")
    }
    frechet = values["classifier_frechet"]
    assert (frechet.count, frechet.data_count) == (40, 80)
    assert "fewer images than the 64 dimensions" in (frechet.note or "")
    # The full-precision noise has the distribution of the data, the faded one does not.
    assert frechet.value > 2 * (frechet.full_precision or 0)
    assert values["classifier_kernel_distance"].value > 2 * abs(
        values["classifier_kernel_distance"].full_precision or 0
    )
    assert len(list((tmp_path / "cache").glob("features-*"))) == 4
    with pytest.raises(StepquantError, match="no classifier for the data of somewhere"):
        measure({"classifier": ""}, MetricInputs("somewhere", images, full, data=DataImages(data)))


def test_a_custom_reward(tmp_path):
    (tmp_path / "custom.py").write_text(REWARD)
    full = torch.zeros(8, 1, 16, 16)
    inputs = MetricInputs("model", full + torch.linspace(0, 0.7, 8)[:, None, None, None], full, prompts=["a"] * 8)
    figure = measure({"reward": f"{tmp_path / 'custom.py'}:brightness"}, inputs)["reward"]
    assert (figure.value, figure.full_precision, figure.count) == (pytest.approx(8.35), 8, 8)
    low, high = figure.interval
    assert 8 < low < 8.35 < high < 8.7
    with pytest.raises(StepquantError, match="1 scores for 8 images"):
        measure({"reward": f"{tmp_path / 'custom.py'}:short"}, inputs)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"beauty": ""}, "metric 'beauty' does not exist"),
        ({"inception": ""}, "as `data`"),
        ({"clip": ""}, "metric clip has no argument"),
        ({"lpips": "/no/such/file"}, "/no/such/file does not exist"),
        ({"reward": "none.py:f"}, "no reward file"),
    ],
)
def test_invalid_metrics_are_rejected_before_generation(metrics, message):
    with pytest.raises(StepquantError, match=message):
        check_metrics(metrics, None)


def test_evaluate_accepts_optional_metrics(unconditional_pipeline, unconditional_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("stepquant.evaluation.compare.peak_memory_bytes", lambda *_: 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "custom.py").write_text(REWARD)
    small = stepquant.Calibration(samples=2, steps=1)
    folder = tmp_path / "model"
    stepquant.save(stepquant.quantize(unconditional_pipeline, "w8a8", recipe="minmax", calibration=small), folder)
    command = ["evaluate", str(folder), "--against", str(unconditional_folder), "--count", "3", "--steps", "1"]

    result = CliRunner().invoke(app, [*command, "--with", "reward=custom.py:brightness", "--json", "f.json"])
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
        (["--with", "beauty=1"], "metric 'beauty' does not exist"),
        (["--with", "classifier", "--data", "empty"], "contains no images"),
        (["--prompts", "parti"], "prompts were given"),
    ):
        result = CliRunner().invoke(app, [*command, *wrong])
        assert result.exit_code == 2, result.output
        assert message in result.stderr
