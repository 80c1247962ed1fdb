from __future__ import annotations

import json

import pytest
import torch

import stepquant
from stepquant import evaluation
from stepquant.errors import StepquantError
from stepquant.evaluation.cost import float32_bytes, folder_bytes


@pytest.fixture(scope="module")
def quantized_folder(unconditional_pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "model"
    calibration = stepquant.Calibration(samples=4, steps=2)
    stepquant.save(stepquant.quantize(unconditional_pipeline, "w8a8", recipe="minmax", calibration=calibration), folder)
    return folder


def test_evaluation_of_a_quantized_pipeline(quantized_folder, unconditional_folder):
    evaluated = evaluation.evaluate(quantized_folder, str(unconditional_folder), count=3, steps=2, seed=5)
    result = evaluated.result
    assert evaluated.quantized.shape == evaluated.full_precision.shape == (3, 1, 16, 16)
    assert 20 < result.psnr_db < 80
    assert result.psnr_db_lowest <= result.psnr_db
    assert len(result.step_error) == 2
    assert all(0 < error < 0.2 for error in result.step_error)
    assert result.frechet_classifier is None
    assert "no classifier" in (result.frechet_note or "")
    assert result.denoiser_bytes == folder_bytes(quantized_folder / "unet") < result.denoiser_bytes_fp32
    assert result.speedup == pytest.approx(result.seconds_per_step_fp32 / result.seconds_per_step)
    assert (result.count, result.steps, result.seed) == (3, 2, 5)
    # A process that loads torch and diffusers takes more than 100 MB, and none of these models takes 10 GB.
    assert 1e8 < result.peak_memory_bytes < 1e10
    assert json.loads(result.model_dump_json())["step_error"] == result.step_error


def test_evaluation_of_a_pipeline_against_itself(unconditional_folder, monkeypatch):
    monkeypatch.setattr("stepquant.evaluation.compare.peak_memory_bytes", lambda *_: 1)
    monkeypatch.setattr("stepquant.evaluation.compare._check_quantized", lambda *_: None)
    result = evaluation.evaluate(unconditional_folder, str(unconditional_folder), count=1, steps=2).result
    assert result.step_error == [0, 0]
    assert result.ssim == pytest.approx(1)


def test_evaluation_against_another_model_is_rejected(quantized_folder, class_folder):
    with pytest.raises(StepquantError, match="is not made from"):
        evaluation.evaluate(quantized_folder, str(class_folder), count=1, steps=1)


def test_evaluation_requires_a_quantized_and_a_full_precision_model(quantized_folder, unconditional_folder):
    with pytest.raises(StepquantError, match="is not quantized"):
        evaluation.evaluate(unconditional_folder, str(unconditional_folder), count=1, steps=1)
    with pytest.raises(StepquantError, match="is quantized; expected the full-precision"):
        evaluation.evaluate(quantized_folder, str(quantized_folder), count=1, steps=1)


def test_bytes(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"12345")
    (tmp_path / "inner" / "b").write_bytes(b"678")
    assert folder_bytes(tmp_path) == 8
    assert float32_bytes(torch.nn.Linear(3, 2).half()) == (3 * 2 + 2) * 4
