"""Folders of stepquant through diffusers' own `from_pretrained`, and weights quantized while loading."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, PipelineQuantizationConfig, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import stepquant
from stepquant import StepquantConfig, StepquantError
from stepquant.checkpoint.card import CARD
from stepquant.checkpoint.format import FORMAT_VERSION, MANIFEST, WEIGHTS, is_checkpoint
from stepquant.layers.quantized import quantized_modules
from stepquant.models import denoiser_name
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request

SMALL = stepquant.Calibration(samples=4, steps=2)
KINDS = ("unconditional_pipeline", "class_pipeline", "text_pipeline")


@pytest.fixture(scope="module")
def quantized(text_pipeline):
    return stepquant.quantize(text_pipeline, "w4a8", recipe="minmax", calibration=SMALL, source="owner/tiny")


@pytest.fixture(scope="module")
def saved(quantized, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    quantized.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def images(pipeline):
    return generate(pipeline, make_request(pipeline, 2), range(2), 0)


def load_unet(folder: Path, **arguments):
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_loads_bit_for_bit(kind, request, tmp_path):
    pipeline = request.getfixturevalue(kind)
    quantized = stepquant.quantize(pipeline, "w4a8", recipe="minmax", calibration=SMALL)
    quantized.save_pretrained(tmp_path / "model")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert type(loaded) is type(pipeline)
    assert torch.equal(images(quantized), images(loaded))
    model_class = type(getattr(pipeline, denoiser_name(pipeline)))
    alone = model_class.from_pretrained(tmp_path / "model", subfolder=denoiser_name(pipeline))
    expected = getattr(quantized, denoiser_name(pipeline)).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in alone.state_dict().items())


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_map(saved, quantized, device_map):
    loaded = DiffusionPipeline.from_pretrained(saved, device_map=device_map)
    assert torch.equal(images(quantized), images(loaded))
    assert load_unet(saved, device_map="auto").hf_device_map == {"": "cpu"}


def test_torch_dtype_does_not_change_codes_and_tables(saved):
    unet = load_unet(saved, torch_dtype=torch.bfloat16)
    assert unet.dtype == torch.bfloat16
    exact = load_unet(saved)
    layers = quantized_modules(exact)
    for name, module in quantized_modules(unet).items():
        for key, tensor in layers[name].state_dict().items():
            assert torch.equal(module.state_dict()[key], tensor), f"{name}.{key}"
    arguments = {"timestep": 500, "encoder_hidden_states": torch.randn(1, 7, 16)}
    x = torch.randn(1, 4, 8, 8)
    half = {"timestep": 500, "encoder_hidden_states": arguments["encoder_hidden_states"].bfloat16()}
    difference = unet(x.bfloat16(), **half).sample.float() - exact(x, **arguments).sample
    assert difference.abs().max() < 0.1


def test_loaded_pipeline_is_saved_as_identical_files(saved, quantized, tmp_path):
    loaded = DiffusionPipeline.from_pretrained(saved)
    loaded.save_pretrained(tmp_path / "again")
    files = [load_file(folder / "unet" / WEIGHTS) for folder in (tmp_path / "again", saved)]
    assert all(
        torch.equal(files[0][name], tensor) and files[0][name].dtype == tensor.dtype
        for name, tensor in files[1].items()
    )
    again = DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(images(quantized), images(again))
    assert is_checkpoint(tmp_path / "again")
    loaded.unet.save_pretrained(tmp_path / "alone" / "unet")
    assert load_file(tmp_path / "alone" / "unet" / WEIGHTS).keys() == files[1].keys()
    load_unet(tmp_path / "alone")
    stepquant.save(again, tmp_path / "complete")
    assert (tmp_path / "complete" / "unet" / WEIGHTS).read_bytes() == (saved / "unet" / WEIGHTS).read_bytes()
    assert '"owner/tiny"' in (tmp_path / "complete" / MANIFEST).read_text()
    assert torch.equal(images(quantized), images(stepquant.load(tmp_path / "complete")))
    with pytest.raises(StepquantError, match="safetensors only"):
        loaded.unet.save_pretrained(tmp_path / "pickle", safe_serialization=False)


def damage_weights(folder: Path, chance: random.Random) -> None:
    path = folder / "unet" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


@pytest.mark.parametrize("written_by", ["stepquant", "diffusers"])
def test_damage_is_refused(copied, tmp_path, written_by):
    folder = copied
    if written_by == "diffusers":
        folder = tmp_path / "again"
        load_unet(copied).save_pretrained(folder / "unet")
    chance = random.Random(0)
    good = (folder / "unet" / WEIGHTS).read_bytes()
    for _ in range(20):
        damage_weights(folder, chance)
        # A damaged header is refused by safetensors itself, before stepquant reads it.
        with pytest.raises((StepquantError, OSError)):
            load_unet(folder)
        (folder / "unet" / WEIGHTS).write_bytes(good)
    load_unet(folder)


def change_tensors(folder: Path, change) -> None:
    """Without manifest and digest only the checks of values remain."""
    (folder / MANIFEST).unlink()
    tensors = load_file(folder / "unet" / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / "unet" / WEIGHTS, {"format": "pt"})


LAYER = "mid_block.resnets.0.conv1"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[f"{LAYER}.weight_scale"].fill_(float("nan")),
        lambda t: t[f"{LAYER}.input_scale"].zero_(),
        lambda t: t[f"{LAYER}.weight_zero_point"].fill_(200),
        lambda t: t[f"{LAYER}.bias"].fill_(float("inf")),
        lambda t: t["conv_norm_out.weight"].fill_(float("nan")),
        lambda t: t.pop(f"{LAYER}.weight_packed"),
        lambda t: t.update({"extra": torch.zeros(1)}),
        lambda t: t.update({f"{LAYER}.weight_packed": torch.zeros(5, dtype=torch.uint8)}),
        lambda t: t.update({f"{LAYER}.weight_packed": t[f"{LAYER}.weight_packed"].float()}),
        lambda t: t.update(
            {"mid_block.attentions.0.transformer_blocks.0.attn1.processor.query_scale": -torch.ones(1, 1, 1)}
        ),
    ],
)
def test_bad_values_are_refused(copied, change):
    change_tensors(copied, change)
    with pytest.raises(StepquantError, match="damaged"):
        load_unet(copied)


def test_links_and_other_formats_are_refused(copied, tmp_path):
    path = copied / "unet" / WEIGHTS
    shutil.move(path, tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(StepquantError, match="symbolic link"):
        load_unet(copied)
    (copied / MANIFEST).unlink()
    with pytest.raises(StepquantError, match="symbolic link"):
        load_unet(copied)
    path.unlink()
    torch.save(load_file(tmp_path / "elsewhere.safetensors"), copied / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(StepquantError, match="not a safetensors file"):
        load_unet(copied)


def test_folder_in_the_hub_cache(saved, quantized, tmp_path):
    """In the cache every file is a link into a folder of blobs."""
    repository = tmp_path / "models--owner--tiny"
    for index, path in enumerate(sorted(path for path in saved.rglob("*") if path.is_file())):
        link = repository / "snapshots" / "0" / path.relative_to(saved)
        blob = repository / "blobs" / str(index)
        for parent in (link.parent, blob.parent):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link.symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    loaded = DiffusionPipeline.from_pretrained("owner/tiny", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(images(quantized), images(loaded))
    assert torch.equal(images(quantized), images(stepquant.load(repository / "snapshots" / "0")))


def test_newer_format_is_refused(copied):
    (copied / MANIFEST).unlink()
    path = copied / "unet" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = FORMAT_VERSION + 1
    path.write_text(json.dumps(config))
    with pytest.raises(StepquantError, match="Upgrade stepquant"):
        load_unet(copied)


def test_weights_are_quantized_while_loading(text_pipeline, text_folder, tmp_path):
    config = PipelineQuantizationConfig(
        quant_mapping={"unet": StepquantConfig("w8a16"), "vae": StepquantConfig("w8a16")}
    )
    loaded = DiffusionPipeline.from_pretrained(text_folder, quantization_config=config)
    for component in (loaded.unet, loaded.vae):
        layers = quantized_modules(component)
        assert layers and all(layer.format.weight.bits == 8 for layer in layers.values())
    difference = (images(loaded) - images(text_pipeline)).abs().max()
    assert 0 < difference < 0.1
    loaded.save_pretrained(tmp_path / "model")
    for again in (DiffusionPipeline.from_pretrained(tmp_path / "model"),):
        assert torch.equal(images(loaded), images(again))
    stepquant.save(loaded, tmp_path / "complete")
    assert torch.equal(images(loaded), images(stepquant.load(tmp_path / "complete")))


def test_overrides_and_groups_while_loading(text_folder):
    spec = {"bits": "w4a16", "overrides": {"conv_in|conv_out": "w16a16"}, "group_size": 8}
    layers = quantized_modules(load_unet(text_folder, quantization_config=StepquantConfig(spec=spec)))
    assert "conv_in" not in layers and "conv_out" not in layers
    assert layers[LAYER].format.weight.groups == (8, 8)
    vae = AutoencoderKL.from_pretrained(text_folder, subfolder="vae", quantization_config=StepquantConfig("w8a16"))
    assert "decoder.conv_out" in quantized_modules(vae)


def test_unsupported_configurations_while_loading(text_folder):
    with pytest.raises(StepquantError, match="need samples"):
        StepquantConfig("w4a8")
    with pytest.raises(StepquantError, match="either bits"):
        StepquantConfig()
    with pytest.raises(StepquantError, match="unknown here"):
        StepquantConfig("w8a16", magic=1)
    config = StepquantConfig(spec={"bits": "w8a16", "overrides": {".": "w16a16"}})
    with pytest.raises(StepquantError, match="UNet2DConditionModel cannot be quantized"):
        load_unet(text_folder, quantization_config=config)
    with pytest.raises(StepquantError, match="needs samples"):
        load_unet(text_folder, quantization_config=StepquantConfig(spec={"bits": "w8a16", "overrides": {".": "w8a8"}}))


def test_model_card_describes_the_model_and_may_be_edited(copied):
    card = (copied / CARD).read_text()
    head = card.split("---")[1]
    assert "library_name: diffusers" in head and "base_model: owner/tiny" in head and "- w4a8" in head
    assert "minmax" in card and "StableDiffusionPipeline" in card
    (copied / CARD).write_text(card + "\nMore of it.\n")
    stepquant.load(copied)


def test_push_to_hub_uploads_the_folder_with_its_card(quantized, monkeypatch):
    uploaded = {}

    class Hub:
        def __init__(self, token=None):
            assert token == "secret"

        def create_repo(self, repo_id, private, exist_ok):
            assert private and exist_ok
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            uploaded.update(repo=repo_id, files={path.name for path in Path(folder_path).iterdir()})
            assert commit_message == "Upload StableDiffusionPipeline"
            stepquant.load(folder_path)
            return "address"

    monkeypatch.setattr("stepquant.saving.HfApi", Hub)
    assert quantized.push_to_hub("tiny", private=True, token="secret") == "address"
    assert uploaded["repo"] == "me/tiny" and {CARD, MANIFEST, "model_index.json", "unet"} <= uploaded["files"]


def test_unsupported_arguments_of_save_pretrained(quantized, tmp_path):
    for arguments in ({"safe_serialization": False}, {"variant": "fp16"}, {"push_to_hub": True}):
        with pytest.raises(StepquantError, match="cannot be saved with"):
            quantized.save_pretrained(tmp_path / "model", **arguments)
    assert not (tmp_path / "model").exists()


LOAD = """
import sys
from diffusers import UNet2DConditionModel
before = set(sys.modules)
{first}
heavy = {{"peft", "scipy", "torchmetrics", "rich", "typer", "matplotlib"}}
assert not heavy & {{name.partition(".")[0] for name in set(sys.modules) - before}}
import torch
import diffusers.quantizers.auto as auto
unet = UNet2DConditionModel.from_pretrained(sys.argv[1], subfolder="unet")
torch.manual_seed(0)
print(unet(torch.randn(1, 4, 8, 8), 3, torch.randn(1, 7, 16)).sample.double().sum().item())
print(sorted(unet.__dict__), type(unet).__mro__, sorted(set(auto.AUTO_QUANTIZER_MAPPING) - {{"stepquant"}}))
"""


def test_import_does_not_change_diffusers(text_folder):
    """Same values, no output, and no optional package is imported."""
    seen = []
    for first in ("", "import stepquant"):
        command = [sys.executable, "-c", LOAD.format(first=first), str(text_folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seen.append((done.stdout, done.stderr))
    assert seen[0] == seen[1] and seen[0][0]


def test_unsupported_version_of_diffusers(monkeypatch, saved):
    check = stepquant.integrations.diffusers.check_diffusers
    check()
    with pytest.raises(StepquantError, match=r"diffusers 0\.35\.2 is too old .* install diffusers 0\.40 or newer"):
        check("0.35.2")
    with pytest.raises(StepquantError, match=r"diffusers 0\.99\.0 is newer .* upgrade stepquant"):
        check("0.99.0", object)
    monkeypatch.setattr("stepquant.integrations.diffusers.NEEDED", ("no_such_hook",))
    with pytest.raises(StepquantError, match="is newer"):
        load_unet(saved)


def test_registration_is_idempotent():
    from diffusers.quantizers import auto

    before = dict(auto.AUTO_QUANTIZER_MAPPING)
    stepquant.integrations.diffusers.register()
    assert before == auto.AUTO_QUANTIZER_MAPPING and before["stepquant"].__module__.startswith("stepquant")
    assert diffusers.__version__
