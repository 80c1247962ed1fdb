from __future__ import annotations

import pytest
from typer.testing import CliRunner

import stepquant
from stepquant.cli.main import app
from stepquant.report.comparison import Comparison, Contender, render_comparison


def _run(*arguments: object):
    return CliRunner().invoke(app, ["compare", *(str(argument) for argument in arguments)])


@pytest.fixture
def comparison(report) -> Comparison:
    small = report.figures.model_copy(update={"denoiser_bytes": 1_000_000, "psnr_db": 20.0, "seconds_per_step": 0.08})
    return Comparison(
        "zoo:model",
        [
            Contender("eight", "minmax", "w8a8", report.figures, report.quantized),
            Contender("four", "tdq", "w4a8", small, report.quantized),
        ],
        report.full_precision,
    )


def test_names_on_a_page_are_escaped(comparison, hostile_report):
    text = render_comparison(comparison)
    hostile = Contender(hostile_report.name, hostile_report.name, hostile_report.name, *_rest(comparison))
    attacked = render_comparison(Comparison(hostile_report.name, [hostile], comparison.full_precision))
    assert "<script>window" not in attacked
    assert attacked.count("<script>") == text.count("<script>") == 1
    assert "http" not in text.replace("http-equiv", "")


def _rest(comparison):
    return comparison.contenders[0].figures, comparison.contenders[0].images


def test_two_models_of_one_origin(
    quantized_folder, unconditional_pipeline, unconditional_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("stepquant.evaluation.compare.peak_memory_bytes", lambda *_: 1)
    small = stepquant.Calibration(samples=2, steps=1)
    eight = tmp_path / "eight"
    stepquant.save(stepquant.quantize(unconditional_pipeline, "w8a8", recipe="minmax", calibration=small), eight)
    out = tmp_path / "page.html"
    given = ("--against", unconditional_folder, "--count", 2, "--steps", 1, "--out", out)
    result = _run(eight, quantized_folder, *given)
    assert result.exit_code == 0, result.output
    rows = {line.split("│")[1].strip(): line for line in result.stdout.splitlines() if line.count("│") > 5}
    assert {"eight", quantized_folder.name, str(unconditional_folder)} <= set(rows)
    assert "w8a8" in rows["eight"]
    text = out.read_text()
    assert text.count("<img ") == 3 * 2
    assert "minmax" in text
    assert "quest" in text

    out.unlink()
    for wrong, message in (
        ([eight, eight, *given], "given twice"),
        ([eight, tmp_path, *given], "not written by stepquant"),
        ([eight, *given, "--out", "page.txt"], "ends in .html"),
        ([eight, *given, "--out", eight / "unet" / "page.html"], "inside the checkpoint"),
        ([eight], "not a local folder"),
    ):
        result = _run(*wrong)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
    assert not out.exists()
