"""Weights of text encoders and autoencoders, loaded by transformers' and diffusers' own `from_pretrained`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, PipelineQuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, T5EncoderModel
from typer.testing import CliRunner

import stepquant
from stepquant import StepquantConfig, StepquantError
from stepquant.checkpoint.card import CARD
from stepquant.checkpoint.format import MANIFEST
from stepquant.cli.main import app
from stepquant.integrations.components import check_components, quantize_component
from stepquant.layers.quantized import quantized_modules
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request

SMALL = stepquant.Calibration(samples=4, steps=2)
ALSO = {"text_encoder": "w8a16", "vae": "w8a16"}
TEXT = Path("text_encoder", "model.safetensors")


@pytest.fixture(scope="module")
def quantized(text_pipeline):
    return stepquant.quantize(text_pipeline, "w8a8", recipe="minmax", calibration=SMALL, also=ALSO)


@pytest.fixture(scope="module")
def saved(quantized, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    quantized.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def images(pipeline):
    return generate(pipeline, make_request(pipeline, 2, prompts=["a", "b"]), range(2), 0)


def test_text_encoder_and_autoencoder_are_quantized_with_the_denoiser(quantized, text_pipeline):
    for name in ALSO:
        assert not quantized_modules(getattr(text_pipeline, name)), "the given pipeline has changed"
        layers = quantized_modules(getattr(quantized, name))
        assert layers and all(layer.format.weight.bits == 8 for layer in layers.values())
    alone = stepquant.quantize(text_pipeline, "w8a8", recipe="minmax", calibration=SMALL)
    assert not quantized_modules(alone.text_encoder) and not quantized_modules(alone.vae), "off by default"
    assert 0 < (images(quantized) - images(alone)).abs().mean() < 0.05


def test_folder_loads_bit_for_bit(saved, quantized):
    expected = images(quantized)
    for loaded in (DiffusionPipeline.from_pretrained(saved), stepquant.load(saved)):
        assert all(quantized_modules(getattr(loaded, name)) for name in ALSO)
        assert torch.equal(images(loaded), expected)
    encoder = CLIPTextModel.from_pretrained(saved, subfolder="text_encoder")
    tokens = torch.tensor([[0, 2, 3, 1]])
    assert torch.equal(encoder(tokens)[0], quantized.text_encoder(tokens)[0])
    assert (
        AutoencoderKL.from_pretrained(saved, subfolder="vae").config.quantization_config["quant_method"] == "stepquant"
    )
    assert "text_encoder (w8a16), vae (w8a16)" in (saved / CARD).read_text()


def test_loaded_components_are_saved_identically(saved, tmp_path):
    for number, loaded in enumerate((DiffusionPipeline.from_pretrained(saved), stepquant.load(saved))):
        loaded.save_pretrained(tmp_path / str(number))
        tensors = [load_file(folder / TEXT) for folder in (saved, tmp_path / str(number))]
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())


def test_torch_dtype_does_not_change_codes_and_scales(saved):
    exact = CLIPTextModel.from_pretrained(saved, subfolder="text_encoder")
    half = CLIPTextModel.from_pretrained(saved, subfolder="text_encoder", dtype=torch.bfloat16)
    assert half.embeddings.token_embedding.weight.dtype == torch.bfloat16
    for name, layer in quantized_modules(half).items():
        expected = exact.get_submodule(name).state_dict()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in layer.state_dict().items())
    tokens = torch.tensor([[0, 2, 3, 1]])
    assert (half(tokens)[0].float() - exact(tokens)[0]).abs().max() < 0.1


def change(folder: Path, how) -> None:
    """Without a manifest, so that only the checks of tensors remain."""
    (folder / MANIFEST).unlink()
    tensors = load_file(folder / TEXT)
    how(tensors)
    save_file(tensors, folder / TEXT, {"format": "pt"})


LAYER = "encoder.layers.0.mlp.fc1"


@pytest.mark.parametrize(
    "how",
    [
        lambda t: t.pop(f"{LAYER}.weight_scale"),
        lambda t: t.update({f"{LAYER}.input_scale": torch.ones(1, 1)}),
        lambda t: t.update({f"{LAYER}.weight_packed": torch.zeros(5, dtype=torch.uint8)}),
        lambda t: t[f"{LAYER}.weight_scale"].fill_(float("nan")),
        lambda t: t[f"{LAYER}.weight_scale"].zero_(),
        lambda t: t[f"{LAYER}.weight_zero_point"].fill_(3),
    ],
)
def test_damage_is_refused(copied, how):
    change(copied, how)
    with pytest.raises(StepquantError, match="damaged"):
        CLIPTextModel.from_pretrained(copied, subfolder="text_encoder")


def test_available_hashes_are_checked(copied):
    data = bytearray((copied / TEXT).read_bytes())
    data[-1] ^= 1
    (copied / TEXT).write_bytes(data)
    with pytest.raises(StepquantError, match="SHA-256"):
        CLIPTextModel.from_pretrained(copied, subfolder="text_encoder")
    (copied / MANIFEST).unlink()
    with pytest.raises(StepquantError, match="its own digest"):
        CLIPTextModel.from_pretrained(copied, subfolder="text_encoder")


def test_text_encoder_is_quantized_while_loading(text_folder, text_pipeline):
    config = PipelineQuantizationConfig(quant_mapping={"text_encoder": StepquantConfig("w4a16")})
    loaded = DiffusionPipeline.from_pretrained(text_folder, quantization_config=config)
    assert {layer.format.weight.bits for layer in quantized_modules(loaded.text_encoder).values()} == {4}
    assert 0 < (images(loaded) - images(text_pipeline)).abs().mean() < 0.2


def test_layers_kept_in_float32_are_not_quantized(tmp_path):
    """T5's code reads the dtype of ``wo``, and T5 has tied weights."""
    _, encoder = tiny.t5()
    quantized = quantize_component(encoder, StepquantConfig("w8a16"))
    layers = quantized_modules(quantized)
    assert layers and not any(name.endswith("wo") for name in layers)
    tokens = torch.tensor([[3, 4, 5, 1]])
    assert 0 < (quantized(tokens)[0] - encoder(tokens)[0]).abs().max() < 0.05
    quantized.save_pretrained(tmp_path / "model")
    loaded = T5EncoderModel.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(tokens)[0], quantized(tokens)[0])


@pytest.mark.parametrize(
    "also, message",
    [
        ({"text_encoder_2": "w8a16"}, "no model 'text_encoder_2' beside its denoiser: expected vae or text_encoder"),
        ({"unet": "w8a16"}, "no model 'unet' beside"),
        ({"scheduler": "w8a16"}, "no model 'scheduler' beside"),
        ({"vae": "w8a8"}, "activations need samples"),
        ({"vae": "eight"}, "not understood"),
    ],
)
def test_unsupported_components_are_refused(also, message, text_pipeline, unconditional_pipeline):
    with pytest.raises(StepquantError, match=message):
        stepquant.quantize(text_pipeline, "w8a8", recipe="minmax", calibration=SMALL, also=also)
    with pytest.raises(StepquantError, match="none, since it has no other"):
        check_components(unconditional_pipeline, {"vae": "w8a16"})


def test_component_cannot_be_quantized_twice(quantized):
    with pytest.raises(StepquantError, match="text_encoder is quantized already"):
        check_components(quantized, ALSO)


def test_command(text_folder, tmp_path):
    arguments = ["quantize", str(text_folder), "--recipe", "minmax", "--samples", "4", "--steps", "2", "--out"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "model"), "--also", "vae=w8a16"])
    assert done.exit_code == 0, done.output
    assert quantized_modules(stepquant.load(tmp_path / "model").vae)
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "other"), "--also", "vae"])
    assert done.exit_code == 2 and "NAME=BITS" in done.stderr
