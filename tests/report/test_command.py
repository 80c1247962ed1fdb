from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

import stepquant
from stepquant.cli.main import app
from stepquant.loading import resolve_pipeline


@pytest.fixture(autouse=True)
def _no_memory_process(monkeypatch):
    monkeypatch.setattr("stepquant.evaluation.compare.peak_memory_bytes", lambda *_: 1)


def _run(*arguments: object):
    return CliRunner().invoke(app, ["report", *(str(argument) for argument in arguments)])


def _fails(*arguments: object) -> str:
    result = _run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_it_writes_a_page_about_the_model(quantized_folder, unconditional_folder, tmp_path):
    out = tmp_path / "new" / "page.html"
    result = _run(quantized_folder, "--against", unconditional_folder, "--count", 2, "--steps", 3, "--out", out)
    assert result.exit_code == 0, result.output
    assert str(out) in result.stdout
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]
    text = out.read_text(encoding="utf-8")
    assert text.count('class="pair"') == 2
    assert "nowhere/at-all quantized to w4a8 with quest" in text
    assert "up_blocks.0.resnets.0.conv1 [0:16]" in text


def test_times_are_shown_of_the_run_they_are_about(quantized_folder, unconditional_folder, tmp_path):
    file, page = tmp_path / "times.json", tmp_path / "page.html"
    given = (quantized_folder, "--against", unconditional_folder, "--count", 1, "--steps", 1, "--out", page)
    out = tmp_path / quantized_folder.name
    command = ["quantize", str(unconditional_folder), "--bits", "w8a8", "--samples", "2", "--steps", "2"]
    result = CliRunner().invoke(app, [*command, "--set", "iterations=1", "--out", str(out), "--times", str(file)])
    assert result.exit_code == 0, result.output
    took = json.loads(file.read_text())
    assert took["stages"]["Reconstructing blocks"] > 0
    assert sum(took["stages"].values()) <= took["seconds"] + 1
    file.write_text(json.dumps(took | {"seconds": 100.0, "stages": {"Reconstructing blocks": 95.4}, "threads": 3}))
    assert _run(*given, "--times", file).exit_code == 0
    assert "2 min on 3 threads: reconstructing blocks 2 min<" in page.read_text()
    page.unlink()
    for damage, message in (
        ({"out": "another"}, "is about another"),
        ({"seconds": -1}, "expected a file that stepquant"),
    ):
        file.write_text(json.dumps(took | damage))
        assert message in _fails(*given, "--times", file)
    assert "cannot be read" in _fails(*given, "--times", tmp_path / "none")
    assert not page.exists()


def test_sensitivities_are_shown_beside_the_bits(quantized_folder, unconditional_folder, tmp_path):
    layer = {"name": "mid_block.resnets.0.conv1", "bits": "w4a8", "error": 0.5, "errors": [0.25, 0.75]}
    measured = {
        "method": "one-at-a-time",
        "samples": 8,
        "step_groups": [[0, 1], [2, 3]],
        "layers": [layer],
        "model": "any",
    }
    file, out = tmp_path / "sensitivity.json", tmp_path / "page.html"
    given = (quantized_folder, "--against", unconditional_folder, "--count", 1, "--steps", 1, "--out", out)
    file.write_text(json.dumps(measured))
    assert _run(*given, "--sensitivity", file).exit_code == 0
    row = out.read_text().partition('aria-label="Table of sensitivities"')[2].partition("</tbody>")[0]
    assert [value in row for value in ("mid_block.resnets.0.conv1", "5.00e-01", ">float<")] == [True] * 3
    out.unlink()
    for damage, message in (
        ({"layers": [layer | {"name": "elsewhere"}]}, "measured on another model"),
        ({"layers": [layer | {"errors": [1.0]}]}, "is damaged"),
        ({"method": "otherwise"}, "is not valid; expected a sensitivity.json"),
    ):
        file.write_text(json.dumps(measured | damage))
        assert message in _fails(*given, "--sensitivity", file)
    assert "cannot be read" in _fails(*given, "--sensitivity", tmp_path / "none")
    assert not out.exists()


def test_classes_are_named(class_folder, tmp_path):
    folder = tmp_path / "model"
    small = stepquant.Calibration(samples=2, steps=1)
    quantized = stepquant.quantize(
        resolve_pipeline(str(class_folder)), "w8a8", recipe="minmax", calibration=small, source=str(class_folder)
    )
    stepquant.save(quantized, folder)
    # The origin that the folder names is at hand: it need not be given.
    result = _run(folder, "--count", 2, "--steps", 1, "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'alt="Image 2: class 1, quantized"' in text
    assert "All are static" in text


def test_the_page_may_lie_beside_the_manifest(quantized_folder, unconditional_folder, tmp_path):
    folder = shutil.copytree(quantized_folder, tmp_path / "model")
    for _ in range(2):
        given = (folder, "--against", unconditional_folder, "--count", 1, "--steps", 1)
        assert _run(*given, "--out", folder / "report.html").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "not a local folder"),
        (["--against", "zoo:nope"], "no model 'nope'"),
        (["--against", "zoo:fashion-ddpm"], "not made from"),
        (["--count", 0], "--count"),
        (["--steps", 0], "--steps"),
        (["--out", "page.txt"], "ends in .html"),
        (["--out", "model/unet/page.html"], "inside the checkpoint"),
    ],
)
def test_what_can_be_wrong(quantized_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(quantized_folder, tmp_path / "model")
    before = sorted(folder.rglob("*"))
    assert message in _fails("model", *arguments)
    assert sorted(folder.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_not_a_quantized_model(unconditional_folder, tmp_path):
    assert "not written by stepquant" in _fails(unconditional_folder, "--out", tmp_path / "page.html")
    assert "not written by stepquant" in _fails(tmp_path / "none", "--out", tmp_path / "page.html")
