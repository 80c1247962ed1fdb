"""Reports to draw: one made up, small and with every kind of content, and the folder of a real model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import stepquant
from stepquant.evaluation import EvaluationResult
from stepquant.report import Report
from stepquant.report.inputs import LayerSensitivity, SensitivityFile
from stepquant.report.structure import ActivationRange, LayerRow

STEP_ERROR = [0.01, 0.02, 0.2]
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\"'`{{ 7*7 }}"


@pytest.fixture
def report() -> Report:
    """Three pairs of 8 x 8 images, each quantized one 0.125 brighter; three steps; layers of every kind."""
    figures = EvaluationResult(
        model="folder",
        against="zoo:model",
        psnr_db=30.0,
        psnr_db_lowest=25.0,
        ssim=0.98,
        step_error=STEP_ERROR,
        frechet_classifier=None,
        frechet_classifier_fp32=None,
        frechet_note="too few images",
        denoiser_bytes=2_500_000,
        denoiser_bytes_fp32=10_000_000,
        peak_memory_bytes=300_000_000,
        peak_memory_bytes_fp32=400_000_000,
        seconds_per_step=0.05,
        seconds_per_step_fp32=0.1,
        speedup=2.0,
        count=3,
        steps=3,
        seed=7,
        guidance=None,
        batch_size=3,
        threads=1,
        versions={"torch": "2.0"},
    )
    images = torch.zeros(3, 1, 8, 8)
    return Report(
        name="a model",
        component="unet",
        provenance={"source": "zoo:model", "recipe": "quest", "spec": {"bits": "w4a8"}, "guidance": None, "seed": 5},
        figures=figures,
        full_precision=images,
        quantized=images + 0.125,
        psnr_db=[30.0, 25.0, 35.0],
        captions=["a cat", "a dog", ""],
        timesteps=torch.tensor([0.0, 400.0, 900.0]),
        activations=[
            ActivationRange("first", 8, torch.tensor([0.01, 0.02, 0.04])),
            ActivationRange("second [0:8]", 4, torch.tensor([0.5, 0.25, 0.5])),
            ActivationRange("third", 8, torch.tensor([0.1])),
        ],
        layers=[
            LayerRow("first", "linear", (10, 10), 4, "8", 3, 900, (2.55, 10.2)),
            LayerRow("second", "convolution", (4, 8, 3, 3), 8, "4", 3, 5000, (3.75, 7.5)),
            LayerRow("third", "linear", (2, 2), None, None, None, 16, None),
            LayerRow("fourth", "attention", (), None, "8", 1, 100, None),
        ],
        component_bytes={"unet": 900, "scheduler": 100},
        content_bytes={"weights in integers": 800, "activation tables": 100},
        sensitivity=_sensitivity("first", "third"),
    )


@pytest.fixture
def hostile_report(report: Report) -> Report:
    """`report` with a hostile text wherever one can come from the checkpoint."""
    return replace(
        report,
        name=HOSTILE,
        component=HOSTILE,
        provenance={HOSTILE: HOSTILE, "source": HOSTILE, "recipe": {HOSTILE: [HOSTILE]}, "spec": {"bits": HOSTILE}},
        captions=[HOSTILE] * 3,
        activations=[
            ActivationRange(HOSTILE, 8, torch.tensor([1.0, 2.0, 4.0])),  # it changes most: its curve is shown first
            ActivationRange("b", 8, torch.tensor([1.0, 1.5, 1.0])),
        ],
        layers=[LayerRow(HOSTILE, "linear", (1, 1), 4, HOSTILE, 3, 9, (1.0, 2.0))],
        component_bytes={HOSTILE: 1},
        sensitivity=_sensitivity(HOSTILE),
    )


def _sensitivity(*names: str) -> SensitivityFile:
    layers = [
        LayerSensitivity(name=name, bits="w4a8", error=0.25 + place, errors=[0.5, 2.0 * place])
        for place, name in enumerate(names)
    ]
    return SensitivityFile(method="one-at-a-time", samples=4, step_groups=[(0, 1), (2, 2)], layers=layers)


@pytest.fixture(scope="session")
def quantized_folder(unconditional_pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`unconditional_pipeline` in 4-bit weights with a grid a step, and its middle in floating point."""
    quantized = stepquant.quantize(
        unconditional_pipeline,
        {"bits": "w4a8", "overrides": {"mid_block.resnets": "w16a16"}},
        recipe="quest",
        calibration=stepquant.Calibration(samples=6, steps=3),
        source="nowhere/at-all",
        hyperparameters={"iterations": 1, "rounding_iterations": 1, "time_iterations": 1, "batch_size": 2},
    )
    out = tmp_path_factory.mktemp("quantized") / "model"
    stepquant.save(quantized, out)
    return out
