import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, StableDiffusionPipeline, UNet2DModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig

import stepquant
from stepquant.assembly import assemble
from stepquant.calibration.fake_quant.layers import wrap
from stepquant.checkpoint.card import CARD
from stepquant.checkpoint.format import MANIFEST, WEIGHTS, Manifest, read_manifest, record
from stepquant.checkpoint.write import narrow
from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.layers.clock import StepClock
from stepquant.layers.install import Quantization
from stepquant.models import denoiser_name
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from tests.described import described

SMALL = stepquant.Calibration(samples=4, steps=2)


@pytest.fixture(scope="module")
def quantized(unconditional_pipeline):
    return stepquant.quantize(unconditional_pipeline, "w4a8", recipe="minmax", calibration=SMALL)


@pytest.fixture(scope="module")
def saved(quantized, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    quantized.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    """A copy of the saved folder to damage."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def reseal(folder: Path) -> None:
    """Update all records and the digest to match the files, as an attacker could."""
    manifest = read_manifest_unchecked(folder)
    files = {path.relative_to(folder).as_posix(): record(path) for path in folder.rglob("*") if path.is_file()}
    files.pop(MANIFEST)
    sealed = manifest.model_copy(update={"files": files}).sealed()
    (folder / MANIFEST).write_text(sealed.to_json())


def read_manifest_unchecked(folder: Path) -> Manifest:
    return Manifest.model_validate_json((folder / MANIFEST).read_text())


@pytest.mark.parametrize("name", ["unconditional_pipeline", "class_pipeline", "text_pipeline"])
def test_saved_pipeline_generates_the_same_images(name, request, tmp_path):
    pipeline = request.getfixturevalue(name)
    quantized = stepquant.quantize(pipeline, "w4a8", recipe="minmax", calibration=SMALL)
    quantized.save_pretrained(tmp_path / "a")
    loaded = stepquant.load(tmp_path / "a")
    assert type(loaded) is type(pipeline)
    component = denoiser_name(pipeline)
    before, after = (getattr(p, component).state_dict() for p in (quantized, loaded))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    wanted = make_request(pipeline, 2)
    assert torch.equal(generate(quantized, wanted, range(2), 0), generate(loaded, wanted, range(2), 0))
    loaded.save_pretrained(tmp_path / "b")
    # transformers writes a loaded tokenizer's configuration with more defaults spelled out than a new one's.
    respelled = {MANIFEST, "tokenizer_config.json"} if name == "text_pipeline" else set()
    for path in sorted((tmp_path / "a").rglob("*")):
        if path.is_file() and path.name not in respelled:
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path


@pytest.mark.parametrize("bits, most", [("w4a8", 0.16), ("w8a8", 0.28)])
def test_files_are_small(bits, most, tmp_path):
    """Including all overhead, for a denoiser of over 10 M parameters."""
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(64, 128, 256), layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count > 10_000_000
    spec, description, clock = QuantSpec.parse(bits), described(model), StepClock()
    layers = {}
    for name in description.layers:
        width = spec.layer_bits(name, first=name in description.firsts, last=name in description.lasts).weight
        split = description.skip_splits.get(name)
        layer = wrap(model.get_submodule(name), width, 8, clock, split=split, weight_range="minmax")
        layer.input_point.set_grid(*torch.ones(2, *layer.input_point.layout.shape))
        layers[name] = layer.to_quantized()
    pipeline = assemble(DDIMPipeline(model, DDIMScheduler()), "unet", Quantization(clock.timesteps, layers), spec, {})
    pipeline.save_pretrained(tmp_path / "model")
    size = sum(path.stat().st_size for path in (tmp_path / "model" / "unet").iterdir())
    assert size <= most * 4 * count
    stepquant.load(tmp_path / "model")


def test_stored_weights_are_packed_and_floats_losslessly_narrowed(saved, quantized):
    tensors = load_file(saved / "unet" / WEIGHTS)
    codes = tensors["mid_block.resnets.0.conv1.weight_packed"]
    assert codes.dtype == torch.uint8 and codes.numel() == 16 * 16 * 9 // 2
    assert narrow(torch.tensor([0.5, 1024.0])).dtype == torch.float16
    assert narrow(torch.tensor([0.1])).dtype == torch.float32
    assert narrow(torch.tensor([1e30])).dtype == torch.float32


def test_random_damage_is_refused(copied):
    chance = random.Random(0)
    files = [path for path in sorted(copied.rglob("*")) if path.is_file() and path.name != CARD]
    for _ in range(100):
        path = chance.choice(files)
        good = path.read_bytes()
        at = chance.randrange(len(good))
        bad = (
            good[:at]
            if chance.random() < 0.3
            else good[:at] + bytes([good[at] ^ (1 << chance.randrange(8))]) + good[at + 1 :]
        )
        path.write_bytes(bytes(bad))
        try:
            if json_equal(good, bytes(bad)):
                continue
            with pytest.raises(StepquantError) as caught:
                stepquant.load(copied)
            assert "\n" not in str(caught.value)
        finally:
            path.write_bytes(good)
    stepquant.load(copied)


def json_equal(good: bytes, bad: bytes) -> bool:
    """Damage to white space does not change the manifest."""
    try:
        return json.loads(good) == json.loads(bad)
    except ValueError:
        return False


def test_messages_for_missing_foreign_and_newer_folders(copied, tmp_path):
    with pytest.raises(StepquantError, match="not a folder"):
        stepquant.load(tmp_path / "nothing")
    with pytest.raises(StepquantError, match="not written by stepquant"):
        stepquant.load(tmp_path)
    raw = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(json.dumps(raw | {"format_version": 99}))
    with pytest.raises(StepquantError, match="Upgrade stepquant"):
        stepquant.load(copied)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "unet/../../outside", "unet//config.json"])
def test_paths_out_of_the_folder_are_refused(copied, name):
    manifest = read_manifest(copied)
    files = dict(manifest.files) | {name: next(iter(manifest.files.values()))}
    (copied / MANIFEST).write_text(manifest.model_copy(update={"files": files}).sealed().to_json())
    with pytest.raises(StepquantError, match="outside the folder"):
        stepquant.load(copied)


def test_symbolic_links_and_stray_files_are_refused(copied, tmp_path):
    shutil.move(copied / "unet" / WEIGHTS, tmp_path / "elsewhere")
    (copied / "unet" / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StepquantError, match="symbolic link"):
        stepquant.load(copied)
    (copied / "unet" / WEIGHTS).unlink()
    shutil.move(tmp_path / "elsewhere", copied / "unet" / WEIGHTS)
    (copied / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(StepquantError, match="not part of the checkpoint"):
        stepquant.load(copied)


def change_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "unet" / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / "unet" / WEIGHTS)
    reseal(folder)


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / "unet" / "config.json").read_text())
    change(config)
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    reseal(folder)


def structure(config: dict) -> dict:
    return config["quantization_config"]["structure"]


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
        lambda t: t.update({"mid_block.attentions.0.processor.query_scale": torch.tensor([[[-1.0]]])}),
    ],
)
def test_bad_values_are_refused_despite_a_valid_digest(copied, change):
    change_weights(copied, change)
    with pytest.raises(StepquantError, match="damaged"):
        stepquant.load(copied)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("quantization_config"),
        lambda c: c.update(_class_name="AutoencoderKL"),
        lambda c: c.update(_class_name="os.system"),
        lambda c: c.update(block_out_channels=[-8, 16]),
        lambda c: c.update(block_out_channels=[1 << 20, 1 << 20]),
        lambda c: structure(c)["layers"][LAYER]["weight"].update(bits=-4),
        lambda c: structure(c)["layers"][LAYER]["weight"].update(groups=[1 << 40]),
        lambda c: structure(c)["layers"].update({"no.such": {"weight": {"bits": 4}}}),
        lambda c: structure(c)["attentions"].update({"conv_in": {}}),
        lambda c: structure(c).update(timesteps=[1.0, 0.0]),
    ],
)  # fmt: skip
def test_bad_configurations_are_refused_despite_a_valid_digest(copied, change):
    change_config(copied, change)
    with pytest.raises(StepquantError) as caught:
        stepquant.load(copied)
    assert "\n" not in str(caught.value)


def test_code_in_the_folder_is_not_run(copied):
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps(index | {"unet": ["evil_module", "Model"]}))
    reseal(copied)
    with pytest.raises(StepquantError, match="custom code"):
        stepquant.load(copied)


def test_failed_save_keeps_the_previous_folder(quantized, copied, tmp_path, monkeypatch):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    for folder in (foreign, copied):
        with pytest.raises(StepquantError, match="overwrite=True"):
            quantized.save_pretrained(folder)
    with pytest.raises(StepquantError, match="give overwrite=True to replace it"):
        quantized.save_pretrained(copied)
    with pytest.raises(StepquantError, match="does not contain a model"):
        quantized.save_pretrained(foreign, overwrite=True)
    assert (foreign / "thesis.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(StepquantError, match="not a folder"):
        quantized.save_pretrained(tmp_path / "file", overwrite=True)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stepquant.checkpoint.write.save_file", full)
    with pytest.raises(StepquantError, match="no space left"):
        quantized.save_pretrained(copied, overwrite=True)
    with pytest.raises(StepquantError, match="no space left"):
        quantized.save_pretrained(tmp_path / "new")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "file", "foreign"]
    stepquant.load(copied)
    quantized.save_pretrained(copied, overwrite=True)
    stepquant.load(copied)


@pytest.mark.parametrize("name", ["owner/name", "zoo:fashion-ddpm"])
def test_hub_id_message_names_from_pretrained(name):
    with pytest.raises(StepquantError, match=f"^{name} is not a folder; .*hub .*DiffusionPipeline.from_pretrained"):
        stepquant.load(name)


def test_saving_inside_a_checkpoint_is_refused(quantized, copied):
    for folder in (copied / "other", copied / "unet" / "deeper" / "other"):
        with pytest.raises(StepquantError, match="lies inside the checkpoint"):
            quantized.save_pretrained(folder)
    stepquant.load(copied)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_mode_of_any_new_file(umask, mode, text_pipeline, tmp_path):
    quantized = stepquant.quantize(text_pipeline, "w8a8", recipe="minmax", calibration=SMALL)
    before = os.umask(umask)
    try:
        quantized.save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert len([name for name in modes if name.endswith(".safetensors")]) >= 2
    assert set(modes.values()) == {mode}, modes


def test_pipeline_with_safety_checker_round_trips(text_pipeline, tmp_path):
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision.to_dict(), projection_dim=8))
    extractor = CLIPImageProcessor(crop_size=8, size=8)
    pipeline = StableDiffusionPipeline(
        **(text_pipeline.components | {"safety_checker": checker, "feature_extractor": extractor})
    )
    quantized = stepquant.quantize(pipeline, "w8a8", recipe="minmax", calibration=SMALL)
    quantized.save_pretrained(tmp_path / "model")
    loaded = stepquant.load(tmp_path / "model")
    assert isinstance(loaded.safety_checker, StableDiffusionSafetyChecker)


def test_recorded_source_contains_no_local_path(unconditional_folder, tmp_path):
    pipeline = DDIMPipeline.from_pretrained(unconditional_folder)
    stepquant.save(stepquant.quantize(pipeline, "w8a8", recipe="minmax", calibration=SMALL), tmp_path / "out")
    assert read_manifest(tmp_path / "out").provenance["source"] == unconditional_folder.name
    assert str(unconditional_folder.parent) not in (tmp_path / "out" / MANIFEST).read_text()
