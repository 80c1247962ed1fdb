"""Damaged and malicious checkpoints are refused in one sentence, without a crash, high memory or running code."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import struct
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import stepquant
from benchmarks.trust.damage import reseal, trial
from stepquant.checkpoint.format import MANIFEST, WEIGHTS, Manifest
from stepquant.errors import StepquantError

SMALL = stepquant.Calibration(samples=4, steps=2)
LAYER = "mid_block.resnets.0.conv1"
SPARE_MEMORY = 1 << 30
"""Bytes of address space that reading a bad checkpoint may take beyond what the process has."""


@pytest.fixture(scope="module")
def saved(unconditional_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    stepquant.quantize(unconditional_pipeline, "w4a8", recipe="minmax", calibration=SMALL).save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refused(folder: Path) -> str:
    """Load in a process with limited memory; returns the message of the refusal."""
    context = get_context("fork")
    parent, child = context.Pipe()

    def load() -> None:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + SPARE_MEMORY, resource.RLIM_INFINITY))
        torch.set_num_threads(1)
        try:
            stepquant.load(folder)
            child.send("loaded")
        except StepquantError as error:
            child.send(f"refused: {error}")
        except BaseException as error:
            child.send(f"{type(error).__name__}: {error}")
        os._exit(0)

    process = context.Process(target=load)
    process.start()
    assert parent.poll(60), "loading hangs"
    message = parent.recv()
    process.join()
    assert process.exitcode == 0
    assert message.startswith("refused: ") and "\n" not in message, message
    return message.removeprefix("refused: ")


def change_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


CONFIGURATIONS = {
    "layers without end": ("unet/config.json", lambda c: c.update(layers_per_block=10**7)),
    "blocks without end": ("unet/config.json", lambda c: c.update(layers_per_block=5000)),
    "channels without end": ("unet/config.json", lambda c: c.update(block_out_channels=[1 << 22, 1 << 22])),
    "a number that no model has": ("unet/config.json", lambda c: c.update(in_channels=10**30)),
    "negative channels": ("unet/config.json", lambda c: c.update(block_out_channels=[-8, -16])),
    "timesteps without end": (
        "scheduler/scheduler_config.json",
        lambda c: c.update(num_train_timesteps=10**10),
    ),
    "table rows without end": (
        "unet/config.json",
        lambda c: c["quantization_config"]["structure"]["layers"][LAYER]["input"].update(rows=10**9),
    ),
    "groups without end": (
        "unet/config.json",
        lambda c: c["quantization_config"]["structure"]["layers"][LAYER]["weight"].update(groups=[1] * 10**6),
    ),
    "groups of other channels": (
        "unet/config.json",
        lambda c: c["quantization_config"]["structure"]["layers"][LAYER]["input"].update(groups=[5]),
    ),
    "bits that no format has": (
        "unet/config.json",
        lambda c: c["quantization_config"]["structure"]["layers"][LAYER]["weight"].update(bits=64),
    ),
    "code by reference": ("scheduler/scheduler_config.json", lambda c: c.update(auto_map={"AutoModel": "evil.Model"})),
    "another class of diffusers": ("model_index.json", lambda c: c.update(scheduler=["diffusers", "AutoencoderKL"])),
    "an attribute for a library": ("model_index.json", lambda c: c.update(scheduler=["__class__", "mro"])),
    "a function for a class": ("model_index.json", lambda c: c.update(scheduler=["diffusers", "utils"])),
    "a pipeline that is none": ("model_index.json", lambda c: c.update(_class_name="ModelMixin")),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_oversized_configurations_are_refused(name, copied):
    path, change = CONFIGURATIONS[name]
    change_json(copied / path, change)
    reseal(copied)
    refused(copied)


@pytest.mark.parametrize("path", ["unet/config.json", "model_index.json", "scheduler/scheduler_config.json", MANIFEST])
def test_json_bombs_are_refused(path, copied):
    good = (copied / path).read_text()
    for bomb in ("[" * 200_000, '{"a":' * 100_000, '{"a": ' + "1" * 10_000 + "}", " " * (17 << 20) + good, "\0", "[]"):
        (copied / path).write_text(bomb)
        if path != MANIFEST:
            reseal(copied)
        refused(copied)


def header(entries: dict) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def touch(path: str) -> object:
    """Pickled, this creates a file when it is read."""

    class Evil:
        def __reduce__(self):
            return Path.touch, (Path(path),)

    return Evil()


def test_files_that_are_not_safetensors(copied, tmp_path):
    weights = copied / "unet" / WEIGHTS
    good = weights.read_bytes()
    bad = {
        "a pickle": pickle.dumps(touch(str(tmp_path / "ran"))),
        "an archive of torch": None,
        "nothing": b"",
        "a header without end": struct.pack("<Q", 1 << 62) + good[8:],
        "a shape without end": header({"x": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}),
        "a negative size": header({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + bytes(4),
        "offsets outside": header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [1 << 40, (1 << 40) + 4]}}),
        "offsets backwards": header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}) + bytes(4),
        "a deep header": struct.pack("<Q", 200_000) + b"[" * 200_000,
    }
    for name, content in bad.items():
        if content is None:
            torch.save({"x": touch(str(tmp_path / "ran"))}, weights)
        else:
            weights.write_bytes(content)
        reseal(copied)
        assert "damaged" in refused(copied), name
    assert not (tmp_path / "ran").exists()


def test_pickles_beside_the_weights_are_never_opened(copied, tmp_path):
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
        torch.save({"x": touch(str(tmp_path / "ran"))}, copied / "unet" / name)
    reseal(copied)
    stepquant.load(copied)
    assert not (tmp_path / "ran").exists()


VALUES = {
    "scale of zero": lambda t: t[f"{LAYER}.weight_scale"].zero_(),
    "infinite scale": lambda t: t[f"{LAYER}.input_scale"].fill_(float("inf")),
    "negative scale": lambda t: t[f"{LAYER}.input_scale"].neg_(),
    "NaN in an attention": lambda t: t["mid_block.attentions.0.processor.key_scale"].fill_(float("nan")),
    "zero point off the grid": lambda t: t[f"{LAYER}.weight_zero_point"].fill_(16),
    "activation zero point of another type": lambda t: t.update(
        {f"{LAYER}.input_zero_point": t[f"{LAYER}.input_zero_point"].short()}
    ),
    "scales of the wrong shape": lambda t: t.update({f"{LAYER}.weight_scale": t[f"{LAYER}.weight_scale"].mT}),
    "an empty tensor": lambda t: t.update({f"{LAYER}.weight_packed": torch.zeros(0, dtype=torch.uint8)}),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_off_the_grid(name, copied):
    tensors = load_file(copied / "unet" / WEIGHTS)
    VALUES[name](tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, copied / "unet" / WEIGHTS)
    reseal(copied)
    with pytest.raises(StepquantError, match="damaged"):
        stepquant.load(copied)


@pytest.mark.parametrize("name", ["unet/../../secret", "/etc/hostname", "..", "unet\\..\\x", "unet/./config.json", ""])
def test_names_outside_the_folder(name, copied):
    manifest = Manifest.model_validate_json((copied / MANIFEST).read_text())
    files = dict(manifest.files) | {name: next(iter(manifest.files.values()))}
    (copied / MANIFEST).write_text(manifest.model_copy(update={"files": files}).sealed().to_json())
    with pytest.raises(StepquantError):
        stepquant.load(copied)


def test_links_in_place_of_files_and_folders(copied, tmp_path):
    shutil.copytree(copied / "unet", tmp_path / "unet")
    shutil.rmtree(copied / "unet")
    (copied / "unet").symlink_to(tmp_path / "unet")
    with pytest.raises(StepquantError, match="symbolic link"):
        stepquant.load(copied)


def test_random_damage_under_a_valid_digest(saved, tmp_path):
    """The first of the thousand that ``make trust`` tries."""
    chance = random.Random(0)
    outcomes = [trial(chance, saved, tmp_path / "damaged") for _ in range(25)]
    assert sum(outcome == "refused" for _kind, outcome in outcomes) > 10
