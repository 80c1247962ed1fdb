from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from stepquant.errors import StepquantError
from stepquant.loading import locate, resolve_pipeline
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from tests.families.registry import FAMILIES
from tests.original_names import whole_model

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(unconditional_folder, tmp_path):
    return shutil.copytree(unconditional_folder, tmp_path / "model")


def test_a_folder_loads_in_float32(folder):
    half = {name: tensor.half() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(half, folder / WEIGHTS)
    unet = resolve_pipeline(str(folder)).unet
    assert {weight.dtype for weight in unet.parameters()} == {torch.float32}


def _no_index(folder):
    (folder / "model_index.json").unlink()


def _damaged_index(folder):
    (folder / "model_index.json").write_text("{")


def _unknown_class(folder):
    _change_index(folder, _class_name="NoSuchPipeline")


def _custom_class(folder):
    _change_index(folder, _class_name=["pipeline", "MyPipeline"])


def _custom_component(folder):
    _change_index(folder, unet=["my_unet", "MyUNet"])


def _custom_code(folder):
    (folder / "unet" / "unet.py").write_text("raise SystemExit")


def _truncated(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _no_weights(folder):
    (folder / WEIGHTS).unlink()


def _nan(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)


def _change_index(folder, **changes):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_index, "no model_index.json"),
        (_damaged_index, "is damaged"),
        (_unknown_class, "NoSuchPipeline"),
        (_custom_class, "pipeline class"),
        (_custom_component, "unet .* custom code"),
        (_custom_code, "unet .* custom code"),
        (_truncated, "cannot be loaded"),
        (_no_weights, "cannot be loaded"),
        (_nan, "conv_in.weight .* NaN"),
    ],
)
def test_damage_is_reported_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(StepquantError, match=message) as caught:
        resolve_pipeline(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nothing-here", "./a/b", "/no/such", "a/b/c"])
def test_neither_a_folder_nor_a_hub_id(name):
    with pytest.raises(StepquantError, match=r"there is no model .* zoo:fashion-ddpm"):
        resolve_pipeline(name)


def test_a_file_is_rejected(folder):
    with pytest.raises(StepquantError, match="is a file"):
        resolve_pipeline(str(folder / "model_index.json"))


def test_an_unreachable_hub(monkeypatch):
    def unreachable(*_args, **_kwargs):
        raise OSError("no route to host\ndetails")

    monkeypatch.setattr("stepquant.loading.DiffusionPipeline.download", unreachable)
    with pytest.raises(StepquantError, match=r"'owner/name' .* hub: no route to host\.$"):
        resolve_pipeline("owner/name")


def test_a_single_file_is_loaded_with_the_configuration_of_a_folder(tmp_path):
    """The file holds the transformer; the other models come from the folder."""
    pipeline = tiny.flux(tmp_path / "tokenizers")
    pipeline.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        pipeline.transformer.x_embedder.weight.mul_(2)
    state = pipeline.transformer.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "flux.safetensors")
    loaded = resolve_pipeline(str(tmp_path / "flux.safetensors"), config=tmp_path / "model")
    assert type(loaded) is type(pipeline)
    assert torch.equal(loaded.transformer.x_embedder.weight, pipeline.transformer.x_embedder.weight)
    request = make_request(pipeline, 2, prompts=["a"], size=16, inputs={"max_sequence_length": 8})
    assert torch.equal(generate(loaded, request, [0], 0), generate(pipeline, request, [0], 0))


def test_a_single_file_that_is_not_a_model(tmp_path, unconditional_folder):
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(StepquantError, match=r"weights\.safetensors cannot be loaded"):
        resolve_pipeline(str(tmp_path / "weights.safetensors"), config=unconditional_folder)
    with pytest.raises(StepquantError, match=r"config is .*, but zoo:fashion-ddpm is not a \.safetensors file"):
        resolve_pipeline("zoo:fashion-ddpm", config=unconditional_folder)
    with pytest.raises(StepquantError, match="is a file; expected the folder of a diffusers pipeline"):
        resolve_pipeline(str(unconditional_folder / "model_index.json"))


def test_a_variant_of_the_weights(unconditional_pipeline, tmp_path):
    unconditional_pipeline.save_pretrained(tmp_path / "model", variant="fp16")
    with pytest.raises(StepquantError, match="cannot be loaded"):
        resolve_pipeline(str(tmp_path / "model"))
    assert resolve_pipeline(str(tmp_path / "model"), variant="fp16").unet is not None


def test_a_single_file_of_a_whole_model_in_original_names(tmp_path):
    """Stable Diffusion as on Civitai: denoiser, autoencoder and text encoder in one file."""
    family = FAMILIES["Stable Diffusion 1.5"]
    pipeline = family.build(tmp_path / "parts")
    pipeline.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        for part in (pipeline.unet.conv_out, pipeline.vae.decoder.conv_out):
            part.weight.mul_(2)
    save_file(whole_model(pipeline), tmp_path / "civitai.safetensors")
    loaded = resolve_pipeline(str(tmp_path / "civitai.safetensors"), config=tmp_path / "model")
    for name in ("unet", "vae", "text_encoder"):
        states = [getattr(one, name).state_dict() for one in (pipeline, loaded)]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), name
    request = make_request(pipeline, 2, prompts=["a"], inputs=dict(family.call))
    assert torch.equal(generate(loaded, request, [0], 0), generate(pipeline, request, [0], 0))


def test_a_revision_and_a_variant_of_a_hub_model(unconditional_pipeline, tmp_path, monkeypatch):
    """A model in the hub's cache, without a network: two revisions, one of which has a variant."""
    cache = tmp_path / "hub" / "models--owner--name"
    for revision, commit, variant in (("main", "a" * 40, None), ("v2", "b" * 40, "fp16")):
        unconditional_pipeline.save_pretrained(cache / "snapshots" / commit, variant=variant)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert locate("owner/name").name == "a" * 40
    assert locate("owner/name", "v2", "fp16").name == "b" * 40
    assert resolve_pipeline("owner/name", revision="v2", variant="fp16").unet is not None
    with pytest.raises(StepquantError, match=r"'owner/name' .* cannot be downloaded from the hub: .*\.$"):
        resolve_pipeline("owner/name", revision="v3")
