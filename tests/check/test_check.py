"""The check on held-out images: a long skip with one channel of another size, which 8 bits for all cannot hold."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from typer.testing import CliRunner

import stepquant
from stepquant.calibration.collection import NOISE_OFFSET
from stepquant.check.result import floor_of
from stepquant.checkpoint import read_manifest
from stepquant.cli.main import app
from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.layers.quantized import quantized_modules
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.progress import Progress
from stepquant.quality.blame import part_errors
from stepquant.quality.held_out import IMAGES, SEED_OFFSET
from stepquant.saving import provenance_of

pytestmark = pytest.mark.usefixtures("quality_check")
SMALL = {"samples": 8, "steps": 2}
READERS = ["down_blocks.0.downsamplers.0.conv", "up_blocks.1.resnets.0.conv_shortcut"]
"""What reads the planted channel without a norm before it."""


@pytest.fixture(scope="module")
def planted(unconditional_pipeline: DDIMPipeline) -> DDIMPipeline:
    """The first of eight channels that the long skip carries is a thousand times as large; its readers undo that."""
    pipeline = copy.copy(unconditional_pipeline)
    unet = copy.deepcopy(unconditional_pipeline.unet)
    source = unet.get_submodule("down_blocks.0.resnets.0.conv2")
    with torch.no_grad():
        for parameter in (source.weight, source.bias):
            parameter[0] *= 1000
        for reader, channel in zip(READERS, (0, 16), strict=True):
            unet.get_submodule(reader).weight[:, channel] /= 1000
    pipeline.register_modules(unet=unet)
    return pipeline


@pytest.fixture(scope="module")
def planted_folder(planted: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "model"
    planted.save_pretrained(folder)
    return folder


def quantize(pipeline, spec="w8a8", **options):
    return stepquant.quantize(pipeline, spec, **{"recipe": "minmax", "calibration": SMALL} | options)


def check_of(pipeline):
    return provenance_of(pipeline.unet)["check"]


def held_out(pipeline) -> torch.Tensor:
    """The check's images, from the seeds that it documents."""
    indices = range(SMALL["samples"], SMALL["samples"] + IMAGES)
    return generate(pipeline, make_request(pipeline, SMALL["steps"]), indices, SEED_OFFSET)


def test_the_check_compares_images_of_the_same_noise(unconditional_pipeline):
    quantized = quantize(unconditional_pipeline)
    found = check_of(quantized)
    error = (held_out(quantized) - held_out(unconditional_pipeline)).square().flatten(1).mean(1)
    expected = 10 * torch.log10(4 / error)
    assert found["decibels"] == pytest.approx(expected.tolist(), abs=0.01)
    assert len(found["step_error"]["unet"]) == 2 and all(0 < error < 0.2 for error in found["step_error"]["unet"])
    assert f"{float(expected.mean()):.1f} dB" in found["summary"] and "warning" not in found


def test_its_noise_is_no_other_noise(unconditional_pipeline, monkeypatch):
    seeds: dict[str, set[int]] = {}
    task = "other"

    class Tasks(Progress):
        def task(self, description, total):
            nonlocal task
            task = description
            return super().task(description, total)

    class Recorded(torch.Generator):
        def manual_seed(self, seed):
            seeds.setdefault(task, set()).add(seed)
            return super().manual_seed(seed)

    monkeypatch.setattr(torch, "Generator", Recorded)
    quantize(unconditional_pipeline, progress=Tasks(), seed=3)
    checked = seeds.pop("Checking on held-out samples")
    assert len(checked) == IMAGES
    assert any(NOISE_OFFSET + 3 in used for used in seeds.values()), "the calibration's"
    assert not any(checked & used for used in seeds.values())


def run(folder, out, *options):
    words = ["quantize", folder, "--recipe", "minmax", "--samples", 8, "--steps", 2, "--out", out, *options]
    return CliRunner().invoke(app, [str(word) for word in words])


def test_low_quality_is_reported_with_layers_steps_and_what_mends_it(planted, planted_folder, tmp_path):
    out = tmp_path / "out"
    result = run(planted_folder, out)
    assert result.exit_code == 0, result.output
    sentence = next(line for line in result.stderr.splitlines() if line.startswith("stepquant: low quality"))
    found = read_manifest(out).provenance["check"]
    assert f"check: {found['summary']}" in result.stdout
    assert found["summary"] in sentence and found["summary"] in (out / "README.md").read_text()
    assert all(reader in sentence for reader in READERS)
    assert re.search(r"mostly at step [01];", sentence)
    overrides = dict(part.rsplit("=", 1) for part in re.findall(r"--override '([^']*)'", sentence))
    promised = float(re.search(r"give (\d+\.\d) dB", sentence)[1])
    assert {pattern.strip("^$").replace("\\", "") for pattern in overrides} == set(READERS)
    found = check_of(quantize(planted, {"bits": "w8a8", "overrides": overrides}))
    assert "warning" not in found and sum(found["decibels"]) / IMAGES == pytest.approx(promised, abs=0.1)


def test_raising_bits_spares_only_the_layers_to_blame(planted):
    quantized = quantize(planted, on_low_quality="raise-bits")
    provenance = provenance_of(quantized.unet)
    assert "warning" not in provenance["check"]
    assert provenance["requested_spec"]["overrides"] == {} and provenance["spec"]["overrides"] == provenance["raised"]
    before, after = (quantized_modules(each.unet) for each in (quantize(planted, check=False), quantized))
    formats = {name: None if name not in after else after[name].format.input for name in before}
    changed = {name for name in before if formats[name] != before[name].format.input}
    assert changed == set(READERS) and all(formats[name] is None for name in READERS)
    assert 10 * torch.log10(4 / (held_out(quantized) - held_out(planted)).square().mean()) > 30


def test_auto_mends_them_by_itself(planted):
    quantized = quantize(planted, recipe="auto")
    provenance = provenance_of(quantized.unet)
    assert {pattern.strip("^$").replace("\\", "") for pattern in provenance["raised"]} == set(READERS)
    assert "warning" not in provenance["check"]
    assert 10 * torch.log10(4 / (held_out(quantized) - held_out(planted)).square().mean()) > 30


def test_an_error_writes_nothing(planted, planted_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("stepquant.check.diagnosis.part_errors", partial(part_errors, measurements=6))
    with pytest.raises(StepquantError, match=r"low quality: .* floor 30 dB"):
        quantize(planted, on_low_quality="error")
    result = run(planted_folder, tmp_path / "out", "--on-low-quality", "error")
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "stepquant: low quality" in result.stderr


def test_modes_are_checked_before_anything_runs(planted):
    with pytest.raises(StepquantError, match='on_low_quality="error" needs the check'):
        quantize(planted, check=False, on_low_quality="error")
    with pytest.raises(StepquantError, match="expected one of warn, raise-bits, error"):
        quantize(planted, on_low_quality="raise")
    with pytest.raises(StepquantError, match="Leave out one"):
        quantize(planted, on_low_quality="raise-bits", correction=True)
    assert "check" not in provenance_of(quantize(planted, check=False).unet)


def test_an_interrupted_check_leaves_the_old_folder_and_continues(unconditional_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(unconditional_folder, out, "--no-check").exit_code == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = ("--overwrite", "--bits", "w8a16")
    with monkeypatch.context() as patch:
        patch.setattr("stepquant.check.run.sample_decibels", _interrupted)
        result = run(unconditional_folder, out, *again)
    assert result.exit_code == 130 and "Run the same command again" in result.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    stepquant.load(out)
    assert run(unconditional_folder, out, *again).exit_code == 0
    assert read_manifest(out).provenance["spec"]["bits"] == "w8a16"


def _interrupted(*_args):
    raise KeyboardInterrupt


def test_floors_follow_the_bits_of_activations():
    def floor(*bits, measure="PSNR"):
        return floor_of([QuantSpec.parse(each) for each in bits], measure)

    assert [floor(bits) for bits in ("w8a8", "w4a16", "w4a8", "w6a6", "w4a4")] == [30, 30, 30, 25, 20]
    assert floor("w8a8", "w4a4") == 20 and floor("w8a8", measure="SNR") == 20
