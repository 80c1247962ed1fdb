"""A quantized layer seen from outside: as the layer that it replaces."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
import torch.nn.functional as F
from test_layers import quantized_linear
from torch import nn

from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.integrations.weight_only import quantize_weights
from stepquant.layers.interception import quantized_attentions
from stepquant.layers.quantized import QuantizedModule, kept_in_float32, quantized_modules
from stepquant.runtime import prepare


def test_weight_gives_what_the_layer_computes():
    module = quantized_linear()
    prepare(module, "reference")
    x = 0.3 * torch.randn(4, 6)
    assert isinstance(module.weight, torch.Tensor)
    expected = F.linear(x, module.weight, module.bias)
    assert (module(x) - expected).abs().max() < 0.05 * expected.abs().max(), "the input's eight bits"
    factor = module.layer().transforms[0].factor
    assert torch.equal(module.weight * factor, module.layer().weight.dequantize() / factor * factor)


def test_shape_dtype_and_device_need_no_values(monkeypatch):
    module = quantized_linear().half()
    monkeypatch.setattr(module, "layer", lambda: pytest.fail("dequantized"))
    weight = module.weight
    assert (weight.dtype, weight.device, weight.shape) == (torch.float16, torch.device("cpu"), (5, 6))
    assert (weight.ndim, weight.numel(), weight.size(0)) == (2, 30, 5)
    assert (module.in_features, module.out_features, module.bias.shape) == (6, 5, (5,))


def test_operations_on_the_weight_return_ordinary_tensors():
    weight = quantized_linear().weight
    for result in (weight + 0, weight.T, weight[0], weight.data, weight.detach(), weight.half(), copy.deepcopy(weight)):
        assert type(result) is torch.Tensor
    assert torch.cat([weight, weight]).shape == (10, 6)


def test_weight_cannot_be_changed():
    module = quantized_linear()
    for change in (torch.Tensor.zero_, lambda weight: weight.copy_(torch.zeros(5, 6))):
        with pytest.raises(StepquantError, match="in place"):
            change(module.weight)


def test_parameters_tell_the_dtype_and_are_not_stored():
    module = quantized_linear()
    model = nn.Sequential(module)
    assert next(model.parameters()).dtype == torch.float32
    model.to(torch.bfloat16)
    assert next(model.parameters()).dtype == module.weight.dtype == module.dtype == torch.bfloat16
    assert {name.rpartition(".")[2] for name in model.state_dict()} == {
        "weight_packed", "weight_scale", "weight_zero_point", "bias", "input_scale", "input_zero_point", "factor",
    }  # fmt: skip
    model.load_state_dict(model.state_dict())


def wan(**config) -> diffusers.WanTransformer3DModel:
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32, **config,
    ).eval()  # fmt: skip


def wan_call() -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 4, 2, 4, 4, generator=generator), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 16, generator=generator),
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wan_keeps_its_time_embedder(dtype):
    model = wan()
    expected = model(**wan_call()).sample
    quantize_weights(model, QuantSpec.parse("w8a16"))
    assert kept_in_float32(wan()) == {f"condition_embedder.time_embedder.linear_{index}" for index in (1, 2)}
    assert isinstance(model.condition_embedder.time_embedder.linear_1, nn.Linear)
    assert isinstance(model.condition_embedder.time_proj, QuantizedModule)
    prepare(model, "reference")
    model.to(dtype)
    assert model.dtype == dtype
    call = {name: value.to(dtype) if value.is_floating_point() else value for name, value in wan_call().items()}
    produced = model(**call).sample
    assert produced.dtype == dtype
    assert (produced.float() - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_timestep_embedding_that_reads_the_dtype_of_its_weight():
    from diffusers.models.transformers.transformer_z_image import TimestepEmbedder

    torch.manual_seed(0)
    embedder = TimestepEmbedder(16, 32, frequency_embedding_size=16)
    expected = embedder(torch.tensor([0.3]))
    quantize_weights(embedder, QuantSpec.parse("w8a16"))
    prepare(embedder, "reference")
    torch.testing.assert_close(embedder(torch.tensor([0.3])), expected, atol=0.02, rtol=0.02)
    assert embedder.half()(torch.tensor([0.3])).dtype == torch.float16


@torch.no_grad()
def test_layers_whose_weights_are_read_by_functions():
    """HunyuanDiT pools its text by `F.multi_head_attention_forward` on the weights of four linears."""
    torch.manual_seed(0)
    pool = diffusers.models.embeddings.HunyuanDiTAttentionPool(4, 16, 2, 8).eval()
    x = torch.randn(2, 4, 16)
    expected = pool(x)
    quantize_weights(pool, QuantSpec.parse("w8a16"))
    prepare(pool, "reference")
    torch.testing.assert_close(pool(x), expected, atol=0.02, rtol=0.02)


@torch.no_grad()
def test_gradient_checkpointing_flag_changes_nothing():
    model = wan()
    quantize_weights(model, QuantSpec.parse("w8a16"))
    prepare(model, "reference")
    expected = model(**wan_call()).sample
    model.enable_gradient_checkpointing()
    model.train()
    with torch.enable_grad():
        assert torch.equal(model(**wan_call()).sample.detach(), expected)


def test_projections_are_not_fused():
    """Fusing would replace them by full-precision layers."""
    model = wan()
    quantize_weights(model, QuantSpec.parse("w8a16"))
    with pytest.raises(StepquantError, match="cannot be fused"):
        copy.deepcopy(model).fuse_qkv_projections()


@torch.no_grad()
def test_projections_fused_before():
    """The fused layers run, and their attention is intercepted."""
    import tiny_denoisers

    for name in ("flux", "wan"):
        model, call = tiny_denoisers.build(name)
        expected = model(**call, return_dict=False)[0]
        model.fuse_qkv_projections()
        quantized = tiny_denoisers.quantized(model, call)
        assert any(layer.endswith("to_qkv") for layer in quantized_modules(quantized))
        assert quantized_attentions(quantized)
        assert (quantized(**call, return_dict=False)[0] - expected).norm() < 0.05 * expected.norm()
