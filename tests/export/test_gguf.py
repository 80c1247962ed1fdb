"""GGUF files, read by the gguf package and by diffusers."""

from __future__ import annotations

import gguf
import pytest
import torch
from diffusers import GGUFQuantizationConfig, SD3Transformer2DModel
from typer.testing import CliRunner

import stepquant as sq
from stepquant.cli.main import app
from stepquant.layers.quantized import quantized_modules
from tests.families.images_text import sd3


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    pipeline = sd3(tmp_path_factory.mktemp("parts"))
    folder = tmp_path_factory.mktemp("original") / "model"
    pipeline.save_pretrained(folder)
    return pipeline, folder


def exported(pipeline, spec, folder):
    """The quantized transformer and the file that the command writes."""
    calibration = sq.Calibration(samples=2, steps=2)
    quantized = sq.quantize(pipeline, spec, recipe="minmax", calibration=calibration)
    quantized.save_pretrained(folder / "quantized")
    result = CliRunner().invoke(
        app, ["export", str(folder / "quantized"), "--to", "gguf", "--out", str(folder / "out")]
    )
    assert result.exit_code == 0, result.output
    assert f"network: {folder / 'out' / 'transformer.gguf'}" in result.output
    return quantized.transformer, folder / "out" / "transformer.gguf", result.output


@pytest.mark.parametrize(("bits", "kind", "size"), [("w4a16", "Q4_1", 20), ("w8a16", "Q8_0", 34), ("w3a8", "Q4_1", 20)])
def test_tensors(bits, kind, size, original, tmp_path):
    """Weights that gguf dequantizes are ours, up to the rounding of scales to float16."""
    spec = {"bits": bits, "group_size": 32, "first_last_bits": 2}
    model, path, output = exported(original[0], spec, tmp_path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert tensors.keys() == original[0].transformer.state_dict().keys()
    blocks = 0
    for name, module in quantized_modules(model).items():
        tensor = tensors[f"{name}.weight"]
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        scale = module.layer().weight.grid.scale.max()
        # An 8-bit weight is up to 128 scales, each rounded by 2^-11.
        assert (found - torch.as_tensor(module.weight)).abs().max() < 0.07 * scale, name
        if tensor.tensor_type.name != "F32":
            assert tensor.tensor_type.name == kind and tensor.n_bytes == found.numel() // 32 * size
            blocks += 1
    assert blocks > 20
    assert "layers stay in floating point: pos_embed.proj" in output


def test_diffusers_loads_it(original, tmp_path):
    _, folder = original
    model, path, _ = exported(original[0], {"bits": "w4a16", "group_size": 32}, tmp_path)
    loaded = SD3Transformer2DModel.from_single_file(
        path,
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        config=str(folder),
        subfolder="transformer",
        torch_dtype=torch.float32,
    )
    generator = torch.Generator().manual_seed(0)
    width = model.config.joint_attention_dim
    call = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, width, generator=generator),
        "pooled_projections": torch.randn(2, model.config.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor([300.0, 700.0]),
    }
    with torch.no_grad():
        expected, found, full = (each(**call).sample for each in (model, loaded, original[0].transformer))
    assert (found - expected).norm() < 0.05 * (full - expected).norm()
