"""Caches, offloading, casting and compilation of diffusers and torch on quantized models with intercepted attention."""

from __future__ import annotations

import copy
from collections import Counter

import diffusers
import pytest
import tiny_denoisers
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from torch import nn

from stepquant.layers.interception import quantized_attentions
from stepquant.layers.quantized import quantized_modules

STEPS = 8
MODELS = ("wan", "flux")


def denoise(model: nn.Module, call: dict, state: dict) -> tuple[torch.Tensor, Counter]:
    """A sampling loop: the result, and how often each projection of a query ran."""
    ran: Counter[str] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: ran.update([name]))
        for name, module in model.named_modules()
        if name.endswith("to_q")
    ]
    unit = 1 if call["timestep"].dtype == torch.int64 else 1 / 1000
    x = call["hidden_states"]
    for step in range(STEPS):
        state["timestep"] = 900 - 100 * step
        time = torch.full_like(call["timestep"], state["timestep"] * unit)
        with model.cache_context("cond"), torch.no_grad():
            x = x - 0.1 * model(**(call | {"hidden_states": x, "timestep": time}), return_dict=False)[0]
    for handle in handles:
        handle.remove()
    return x, ran


CACHES = {
    "FirstBlockCache": lambda state: diffusers.FirstBlockCacheConfig(threshold=0.5),
    "PyramidAttentionBroadcast": lambda state: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(0, 1000),
        spatial_attention_block_identifiers=("transformer_blocks", "blocks"),
        cross_attention_block_identifiers=("transformer_blocks", "blocks"),
        current_timestep_callback=lambda: state["timestep"],
    ),
    "TaylorSeer": lambda state: diffusers.TaylorSeerCacheConfig(
        cache_interval=3,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"(single_)?(transformer_)?blocks\.\d+\.attn\d?"],
    ),
    "FasterCache": lambda state: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 681),
        spatial_attention_block_identifiers=("transformer_blocks", "blocks"),
        attention_weight_callback=lambda _: 0.5,
        is_guidance_distilled=True,
        current_timestep_callback=lambda: state["timestep"],
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def models(request) -> tuple[nn.Module, nn.Module, dict]:
    model, call = tiny_denoisers.build(request.param)
    return model, tiny_denoisers.quantized(model, call), call


@pytest.mark.parametrize("cache", CACHES)
def test_caches_skip_the_same_work(models, cache):
    original, quantized, call = (copy.deepcopy(part) for part in models)
    plain, every = denoise(quantized, call, {})
    assert set(every.values()) == {STEPS}
    results = []
    for model in (original, quantized):
        state: dict = {}
        model.enable_cache(CACHES[cache](state))
        results.append(denoise(model, call, state))
    (expected, work), (produced, quantized_work) = results
    assert quantized_work == work and sum(work.values()) < sum(every.values())
    assert (produced - expected).norm() < 0.05 * expected.norm()
    quantized.disable_cache()
    assert torch.equal(denoise(quantized, call, {})[0], plain)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloading(models, offload_type):
    _, quantized, call = (copy.deepcopy(part) for part in models)
    expected, _ = denoise(quantized, call, {})
    cpu = torch.device("cpu")
    groups = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    quantized.enable_group_offload(cpu, cpu, offload_type, **groups)
    assert torch.equal(denoise(quantized, call, {})[0], expected)


def test_offloading_of_every_layer(models):
    """As `enable_sequential_cpu_offload`: tensors are on the meta device between calls."""
    _, quantized, call = (copy.deepcopy(part) for part in models)
    expected, _ = denoise(quantized, call, {})
    cpu_offload(quantized, execution_device=torch.device("cpu"), offload_buffers=True)
    assert quantized_modules(quantized).popitem()[1].weight_scale.is_meta
    assert torch.equal(denoise(quantized, call, {})[0], expected)
    remove_hook_from_module(quantized, recurse=True)


def test_layerwise_casting(models):
    """Layers that stay in floating point are stored in another dtype; codes and tables are not rounded."""
    _, quantized, call = (copy.deepcopy(part) for part in models)
    expected, _ = denoise(quantized, call, {})
    layers = {name: layer.layer() for name, layer in quantized_modules(quantized).items()}
    quantized.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    produced, _ = denoise(quantized, call, {})
    assert (produced - expected).norm() < 0.02 * expected.norm()
    assert quantized.dtype == torch.float32
    for name, layer in quantized_modules(quantized).items():
        assert torch.equal(layer.layer().weight.grid.scale, layers[name].weight.grid.scale)


def test_half_precision(models):
    """Floating-point layers are rounded, scales are not; the model's dtype follows."""
    _, quantized, call = (copy.deepcopy(part) for part in models)
    expected, _ = denoise(quantized, call, {})
    quantized.to(torch.bfloat16)
    assert quantized.dtype == torch.bfloat16
    assert all(attention.query_scale.dtype == torch.float32 for attention in quantized_attentions(quantized).values())
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in call.items()}
    produced, _ = denoise(quantized, half, {})
    assert produced.dtype == torch.bfloat16 and (produced.float() - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux", "z_image"])
def test_compile(name):
    """Graph breaks are allowed; the output is that of the model without compilation, at every step."""
    model, call = tiny_denoisers.build(name)
    quantized = tiny_denoisers.quantized(model, call)
    expected = quantized(**call, return_dict=False)[0]
    compiled = torch.compile(quantized, backend="eager")
    for _ in range(2):
        produced = compiled(**call, return_dict=False)[0]
        for one, other in zip(produced, expected, strict=True):
            torch.testing.assert_close(one, other)
    attention = next(iter(quantized_attentions(quantized).values()))
    attention.query_scale *= 8
    changed = quantized(**call, return_dict=False)[0]
    assert not torch.equal(changed[0], expected[0])
    torch.testing.assert_close(compiled(**call, return_dict=False)[0][0], changed[0])
