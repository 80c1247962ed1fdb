"""Folders of format version 1, written by the code of that version, with its outputs and codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file
from transformers import CLIPTextModel

import stepquant
from stepquant.checkpoint import read_manifest
from stepquant.checkpoint.upgrade import upgrade_config
from stepquant.errors import StepquantError
from stepquant.layers.quantized import quantized_modules

DATA = Path(__file__).parent / "data"
VERSION_1 = DATA / "version1"
LOADERS = {
    "stepquant": lambda folder: stepquant.load(folder, backend="reference"),
    "diffusers": DiffusionPipeline.from_pretrained,
}


def check(unet: UNet2DModel) -> None:
    """The outputs and the codes that version 1 computed."""
    stepquant.runtime.prepare(unet, "reference")
    expected = load_file(DATA / "version1_expected.safetensors")
    with torch.no_grad():
        for step in (750, 250):
            assert torch.equal(unet(expected["sample"], step).sample, expected[f"output_{step}"])
    layers = quantized_modules(unet)
    for name in {key.removesuffix(".codes") for key in expected if key.endswith(".codes")}:
        weight = layers[name].layer().weight
        assert torch.equal(weight.codes, expected[f"{name}.codes"])
        assert torch.equal(weight.dequantize(), expected[f"{name}.weight"])


@pytest.mark.parametrize("loader", LOADERS)
def test_version_1_folder_loads_and_is_saved_as_version_2(loader, tmp_path):
    pipeline = LOADERS[loader](VERSION_1)
    check(pipeline.unet)
    assert pipeline.unet.config["quantization_config"]["spec"]["smoothing"] is True
    stepquant.save(pipeline, tmp_path / "saved")
    assert read_manifest(tmp_path / "saved").format_version == 2
    layer = json.loads((tmp_path / "saved/unet/config.json").read_text())["quantization_config"]["structure"]["layers"]
    assert layer["up_blocks.0.resnets.0.conv1"] == {
        "weight": {"bits": 4, "groups": [8, 8, 8, 8], "rows": 1},
        "input": {"bits": 4, "groups": [16, 16], "rows": 4},
        "transforms": [{"kind": "smoothing"}],
    }
    check(LOADERS[loader](tmp_path / "saved").unet)


def test_version_1_text_encoder_loads_with_transformers(tmp_path):
    expected = load_file(DATA / "version1_text_encoder_expected.safetensors")
    model = CLIPTextModel.from_pretrained(DATA / "version1_text_encoder")
    model.save_pretrained(tmp_path)
    for each in (model, CLIPTextModel.from_pretrained(tmp_path)):
        with torch.no_grad():
            assert torch.equal(each(expected["input_ids"]).last_hidden_state, expected["last_hidden_state"])
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format_version"] == 2


def component(tmp_path: Path, change) -> Path:
    """A copy of the denoiser's folder without a manifest, its configuration changed."""
    folder = Path(shutil.copytree(VERSION_1 / "unet", tmp_path / "unet"))
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("version", [3, 0, "1", None, 1.0])
def test_unknown_version_is_refused(version, tmp_path):
    folder = component(tmp_path, lambda config: config.update(format_version=version))
    with pytest.raises(StepquantError, match=r"format version .*; expected 1 to 2") as caught:
        UNet2DModel.from_pretrained(folder)
    assert "\n" not in str(caught.value) and ("Upgrade stepquant" in str(caught.value)) == (version == 3)


def test_unknown_transform_is_refused(tmp_path):
    def change(config) -> None:
        config.update(upgrade_config(config, "config")[0])
        config["structure"]["layers"]["conv_out"]["transforms"] = [{"kind": "rotation"}]

    with pytest.raises(StepquantError, match="unknown transform 'rotation'; expected smoothing") as caught:
        UNet2DModel.from_pretrained(component(tmp_path, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("spec"),
        lambda config: config["structure"].update(layers=[1, 2]),
        lambda config: config["structure"]["layers"].update(conv_out={"weight_bits": 8}),
        lambda config: config["structure"]["layers"]["conv_out"].update(colour="red"),
        lambda config: config["structure"]["layers"]["conv_out"].update(weight_bits=9),
        lambda config: config["structure"]["layers"]["conv_in"].update(weight_groups=[2]),
        lambda config: config["structure"]["layers"]["conv_in"].update(balanced=True),
        lambda config: config.update(structure="none"),
        lambda config: config.update(provenance={"spec": 1}),
    ],
)
def test_damaged_version_1_configuration_is_refused(change, tmp_path):
    with pytest.raises(StepquantError) as caught:
        UNet2DModel.from_pretrained(component(tmp_path, change))
    assert "\n" not in str(caught.value)
