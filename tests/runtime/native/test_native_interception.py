"""Attention that is quantized by intercepting `scaled_dot_product_attention`, in integers."""

from __future__ import annotations

import pytest
import tiny_denoisers
import torch
import torch.nn.functional as F
from torch import nn

from stepquant.layers.interception import quantized_attentions
from stepquant.runtime import fallbacks, prepare, summary
from stepquant.runtime.native.attention import NativeAttention
from tests.layers.test_interception import Caller, attentions_of, install_quantized, main_output

pytestmark = pytest.mark.usefixtures("kernels")

SHAPES = {
    "cross-attention": ((2, 3, 35, 24), (2, 3, 77, 24)),
    "grouped queries": ((2, 6, 35, 40), (2, 2, 35, 40)),
    "one key head": ((2, 4, 5, 9), (2, 1, 70, 9)),
    "three dimensions": ((4, 35, 8), (4, 33, 8)),
    "five dimensions": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8)),
}
MASKS = {
    "none": lambda scores: {},
    "keys of a sample": lambda scores: {
        "attn_mask": torch.rand(scores[0], *(1,) * (len(scores) - 2), scores[-1]) < 0.7
    },
    "pairs": lambda scores: {"attn_mask": torch.rand(scores[-2:]) < 0.7},
    "additive": lambda scores: {"attn_mask": torch.randn(scores)},
    "causal": lambda scores: {"is_causal": True},
    "scale": lambda scores: {"scale": 0.5},
}


@pytest.fixture
def native_calls(monkeypatch):
    """Arguments of every attention that is computed in integers."""
    calls = []
    forward = NativeAttention.forward
    monkeypatch.setattr(NativeAttention, "forward", lambda self, *args: calls.append(args) or forward(self, *args))
    return calls


@torch.no_grad()
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_arguments(shape, mask, native_calls):
    """As the simulation but for probabilities at ties, and as SDPA but for their rounding to 8 bits."""
    torch.manual_seed(0)
    of_query, of_key = SHAPES[shape]
    query, key, value = (torch.randn(size) for size in (of_query, of_key, of_key))
    arguments = MASKS[mask]((*of_query[:-1], of_key[-2])) | {"enable_gqa": of_query[-3] != of_key[-3]}
    model = nn.ModuleDict({"attention": Caller()})
    grids = install_quantized(model, ["attention"])
    simulated = model["attention"](query, key, value, **arguments)
    processor = quantized_attentions(model)["attention"]
    operands = [processor.operand(name, x) for name, x in (("query", query), ("key", key), ("value", value))]
    exact = F.scaled_dot_product_attention(*operands, **arguments).nan_to_num()
    prepare(model, "native")
    found = model["attention"](query, key, value, **arguments)
    assert len(native_calls) == 1 and found.shape == simulated.shape
    step = float(grids.probability.scale.max()) * float(value.abs().max())
    error = (found - simulated).abs()
    assert (error > 1e-5 * simulated.abs().max()).float().mean() < 0.01 and error.max() <= 1.5 * step
    assert (found - exact).abs().max() <= 8 * step


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transposed_operands_are_read_in_place(dtype, native_calls, monkeypatch):
    """As diffusers passes them: views of [B, N, heads, d]; keys of fewer heads are not repeated."""
    model = nn.ModuleDict({"attention": Caller()})
    install_quantized(model, ["attention"])
    prepare(model, "native")
    query, key, value = (torch.randn(2, 33, heads, 40, dtype=dtype).transpose(1, 2) for heads in (6, 2, 2))
    expected = model["attention"](*(x.contiguous() for x in (query, key, value)), enable_gqa=True)
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    found = model["attention"](query, key, value, enable_gqa=True)
    assert [x.data_ptr() for x in native_calls[-1][:3]] == [x.data_ptr() for x in (query, key, value)]
    assert torch.equal(found, expected) and found.transpose(1, 2).is_contiguous()


@torch.no_grad()
@pytest.mark.parametrize("name", tiny_denoisers.BUILDERS)
def test_every_attention_of_a_model(name, native_calls):
    model, call = tiny_denoisers.build(name)
    attentions = attentions_of(model, call)
    install_quantized(model, attentions)
    simulated = main_output(model, call)
    prepare(model, "native")
    found = main_output(model, call)
    assert len(native_calls) == len(attentions) and f"attentions: {len(attentions)} native" in summary(model)
    assert fallbacks(model) == []
    assert (found - simulated).norm() <= 1e-3 * simulated.norm()
    prepare(model, "reference")
    assert fallbacks(model) == list(quantized_attentions(model))
