"""Attention against `F.scaled_dot_product_attention` and diffusers' processors, and many scores in parts."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTokenRefiner

from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.activation_quantizers import QDrop
from stepquant.calibration.fake_quant.layers import CalibratedAttention
from stepquant.core.noise import SampleNoise
from stepquant.errors import StepquantError
from stepquant.layers import scaled_dot_product
from stepquant.layers.attention import AttentionProcessor, can_quantize_attention
from stepquant.layers.clock import StepClock
from stepquant.layers.format import OPERANDS

HEADS, LENGTH = 4, 12


@pytest.fixture
def learning():
    """Attention whose operands are quantized, with scales that learn."""
    torch.manual_seed(0)
    clock = StepClock()
    processor = CalibratedAttention(
        {name: ActivationPoint(8, clock, unsigned=name == "probability") for name in OPERANDS}
    )
    operands = [torch.randn(2, HEADS, LENGTH, 5, requires_grad=True) for _ in range(3)]
    for quantizer in processor.points.values():
        quantizer.observe()
    with torch.no_grad():
        processor.attend(*operands, None)
    for quantizer in processor.points.values():
        quantizer.calibrate("least-error")
        quantizer.learn_table()
    return processor, operands


def results(processor, operands, mask):
    """The output, and the gradients of its square on operands and scales; and the most scores seen at a time."""
    learned = [parameter for quantizer in processor.points.values() for parameter in quantizer.parameters_in_training()]
    seen: list[int] = []
    handle = processor.points["probability"].register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    output = processor.attend(*operands, mask)
    gradients = torch.autograd.grad(output.square().sum(), [*operands, *learned])
    handle.remove()
    return [output, *gradients], seen


@pytest.mark.parametrize("masked", [False, True])
def test_processing_heads_in_parts(learning, monkeypatch, masked):
    mask = torch.randn(2, 1, 1, LENGTH) if masked else None
    expected, seen = results(*learning, mask)
    whole = 2 * HEADS * LENGTH**2
    assert seen == [whole]
    monkeypatch.setattr(scaled_dot_product, "MOST_SCORES", whole // 2)
    produced, seen = results(*learning, mask)
    assert seen == 4 * [whole // 2], "each half once forward, and once again for the gradient"
    # LSQ divides the gradient of a scale by the root of the number of values, of which half are seen at a time.
    factors = [1, 1, 1, 1, 1, 1, 2**0.5, 2**0.5]
    for one, other, factor in zip(produced, expected, factors, strict=True):
        assert torch.allclose(one, factor * other, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        learning[0].attend(*learning[1], mask)


def test_random_numbers_are_drawn_once(learning, monkeypatch):
    """Under QDrop a second forward pass would see other ones."""
    processor, operands = learning
    for point in processor.points.values():
        point.dropout = QDrop(0.5, SampleNoise(0, 0, range(2)))
    monkeypatch.setattr(scaled_dot_product, "MOST_SCORES", 2 * LENGTH**2)
    _, seen = results(processor, operands, None)
    assert seen == HEADS * [2 * LENGTH**2]


QUERIES, KEYS = 6, 5


def boolean_masks():
    """Shape -> boolean mask of a batch of 2, `HEADS` heads, `QUERIES` queries and `KEYS` keys."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(QUERIES, KEYS), (1, KEYS), (QUERIES, 1), (2, 1, 1, KEYS), (2, 1, QUERIES, KEYS), (HEADS, 1, KEYS)]
    masks = {shape: torch.rand(shape, generator=generator) < 0.6 for shape in [*shapes, (2, HEADS, QUERIES, KEYS)]}
    masks[2, HEADS, QUERIES, KEYS][1, 2, 3] = False  # a query that attends to nothing
    return masks


def masks_of(dtype):
    """Every boolean mask, the additive ones that hide the same keys, and others."""
    for shape, mask in boolean_masks().items():
        yield pytest.param(mask, id=f"boolean {shape}")
        hidden = torch.zeros(shape, dtype=dtype)
        yield pytest.param(hidden.masked_fill(~mask, -torch.inf), id=f"-inf {shape}")
        yield pytest.param(hidden.masked_fill(~mask, torch.finfo(dtype).min), id=f"smallest {shape}")
        yield pytest.param(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype), id=f"bias {shape}")
    yield pytest.param(torch.zeros(QUERIES, KEYS, dtype=torch.bool), id="nothing")


MASKS = [
    pytest.param(dtype, *mask.values, id=f"{str(dtype).removeprefix('torch.')} {mask.id}")
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    for mask in masks_of(dtype)
]


@pytest.mark.parametrize("parts", [1, HEADS])
@pytest.mark.parametrize(("dtype", "mask"), MASKS)
def test_masks(dtype, mask, parts, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, HEADS, count, 8, generator=generator).to(dtype) for count in (QUERIES, KEYS, KEYS)
    )
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    monkeypatch.setattr(scaled_dot_product, "MOST_SCORES", 2 * HEADS * QUERIES * KEYS // parts)
    produced = AttentionProcessor().attend(query, key, value, mask)
    assert produced.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(produced, expected, atol=tolerance, rtol=0)


def test_gradients_of_a_fully_masked_query():
    operands = [torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    produced = torch.autograd.grad(AttentionProcessor().attend(*operands, mask).square().sum(), operands)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*operands, mask).square().sum(), operands)
    torch.testing.assert_close(produced, expected)


def test_mask_of_another_shape():
    query, key, value = torch.randn(3, 2, HEADS, QUERIES, 8)
    with pytest.raises(StepquantError, match=r"mask has shape \[3, 1, 6\]; expected .* \[2, 4, 6, 6\]"):
        AttentionProcessor().attend(query, key, value, torch.ones(3, 1, 6, dtype=torch.bool))


PREPARED = {
    "keys of a sample": torch.tensor([[True, True, False, True, False], [True] * 5]),
    "bias of keys": torch.randn(2, 1, KEYS),
    "of each head": torch.rand(2 * HEADS, QUERIES, KEYS) < 0.7,
    "scores of a sample": torch.rand(2, 1, QUERIES, KEYS) < 0.7,
}


@torch.no_grad()
@pytest.mark.parametrize("name", PREPARED)
def test_masks_that_diffusers_prepares(name):
    """Each shape that `Attention.prepare_attention_mask` takes, in front of diffusers' own processor."""
    torch.manual_seed(0)
    layer = Attention(query_dim=8, cross_attention_dim=7, heads=HEADS, dim_head=4, processor=AttnProcessor2_0())
    arguments = torch.randn(2, QUERIES, 8), torch.randn(2, KEYS, 7), PREPARED[name]
    expected = layer(*arguments)
    layer.set_processor(AttentionProcessor())
    torch.testing.assert_close(layer(*arguments), expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_token_refiner_of_hunyuan_video():
    """Its masks are boolean, and the attention is otherwise as diffusers computes it."""
    torch.manual_seed(0)
    refiner = HunyuanVideoTokenRefiner(6, num_attention_heads=2, attention_head_dim=8, num_layers=2).eval()
    tokens, mask = torch.randn(2, 5, 6), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    expected = refiner(tokens, torch.tensor([500.0, 500.0]), mask)
    replaced = copy.deepcopy(refiner)
    layers = [module for module in replaced.modules() if can_quantize_attention(module)]
    assert len(layers) == 2
    for layer in layers:
        layer.set_processor(AttentionProcessor())
    produced = replaced(tokens, torch.tensor([500.0, 500.0]), mask)
    torch.testing.assert_close(produced, expected, atol=1e-6, rtol=1e-6)
