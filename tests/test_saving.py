"""`save_pretrained` of a quantized pipeline, however it was made."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DiffusionPipeline

import stepquant
from stepquant.checkpoint import is_checkpoint, read_manifest
from stepquant.layers.quantized import quantized_modules

SMALL = stepquant.Calibration(samples=4, steps=2)
LAYER = "mid_block.resnets.0.conv1"


def quantized(pipeline: DDIMPipeline, bits: str) -> DDIMPipeline:
    return stepquant.quantize(pipeline, bits, recipe="minmax", calibration=SMALL)


@pytest.fixture(scope="module")
def pipeline(unconditional_pipeline: DDIMPipeline) -> DDIMPipeline:
    return quantized(unconditional_pipeline, "w8a8")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_a_copy_saves_its_replaced_denoiser(copied, pipeline, unconditional_pipeline, tmp_path):
    other = quantized(unconditional_pipeline, "w4a8").unet
    mine = copied(pipeline)
    mine.register_modules(unet=other)
    mine.save_pretrained(tmp_path / "model")
    assert read_manifest(tmp_path / "model").provenance["spec"]["bits"] == "w4a8"
    loaded = quantized_modules(stepquant.load(tmp_path / "model").unet)[LAYER].layer()
    assert torch.equal(loaded.weight.codes, quantized_modules(other)[LAYER].layer().weight.codes)


def test_pipelines_loaded_by_diffusers_and_by_stepquant_save_the_same_files(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    for name, load in (("diffusers", DiffusionPipeline.from_pretrained), ("stepquant", stepquant.load)):
        load(tmp_path / "model").save_pretrained(tmp_path / name)
    expected = content(tmp_path / "model")
    assert {"stepquant.json", "README.md"} <= set(expected)
    assert content(tmp_path / "diffusers") == content(tmp_path / "stepquant") == expected


def test_a_pipeline_built_from_a_quantized_denoiser_saves_a_checkpoint(pipeline, tmp_path):
    DDIMPipeline(pipeline.unet, pipeline.scheduler).save_pretrained(tmp_path / "model")
    assert read_manifest(tmp_path / "model").component == "unet"


def test_a_copy_with_a_full_precision_denoiser_saves_as_diffusers_does(pipeline, unconditional_pipeline, tmp_path):
    mine = copy.copy(pipeline)
    mine.register_modules(unet=unconditional_pipeline.unet)
    mine.save_pretrained(tmp_path / "ours")
    unconditional_pipeline.save_pretrained(tmp_path / "theirs")
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")
    assert not is_checkpoint(tmp_path / "ours")
