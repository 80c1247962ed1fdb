"""Attention with many scores, a few heads at a time: the same result, the same gradients, less memory."""

from __future__ import annotations

import pytest
import torch

from stepquant.calibration.fake_quant.activation import ActivationQuantizer
from stepquant.calibration.fake_quant.layers import TrainableAttention
from stepquant.core.noise import SampleNoise
from stepquant.layers import attention
from stepquant.layers.clock import StepClock
from stepquant.layers.format import OPERANDS

HEADS, LENGTH = 4, 12


@pytest.fixture
def learning():
    """Attention whose operands are quantized, with scales that learn."""
    torch.manual_seed(0)
    clock = StepClock()
    processor = TrainableAttention(
        {name: ActivationQuantizer(8, clock, unsigned=name == "probability") for name in OPERANDS}
    )
    operands = [torch.randn(2, HEADS, LENGTH, 5, requires_grad=True) for _ in range(3)]
    for quantizer in processor.quantizers.values():
        quantizer.observing = True
    with torch.no_grad():
        processor.attend(*operands, None)
    for quantizer in processor.quantizers.values():
        quantizer.set_range("least-error")
        quantizer.learn()
    return processor, operands


def results(processor, operands, mask):
    """The output, and the gradients of its square on operands and scales; and the most scores seen at a time."""
    learned = [parameter for quantizer in processor.quantizers.values() for parameter in quantizer.learned()]
    seen: list[int] = []
    handle = processor.quantizers["probability"].register_forward_hook(lambda _, args, __: seen.append(args[0].numel()))
    output = processor.attend(*operands, mask)
    gradients = torch.autograd.grad(output.square().sum(), [*operands, *learned])
    handle.remove()
    return [output, *gradients], seen


@pytest.mark.parametrize("masked", [False, True])
def test_heads_may_be_taken_apart(learning, monkeypatch, masked):
    mask = torch.randn(2, 1, 1, LENGTH) if masked else None
    expected, seen = results(*learning, mask)
    whole = 2 * HEADS * LENGTH**2
    assert seen == [whole]
    monkeypatch.setattr(attention, "MOST_SCORES", whole // 2)
    produced, seen = results(*learning, mask)
    assert seen == 4 * [whole // 2], "each half once forward, and once again for the gradient"
    # LSQ divides the gradient of a scale by the root of the number of values, of which half are seen at a time.
    factors = [1, 1, 1, 1, 1, 1, 2**0.5, 2**0.5]
    for one, other, factor in zip(produced, expected, factors, strict=True):
        assert torch.allclose(one, factor * other, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        learning[0].attend(*learning[1], mask)


def test_numbers_drawn_at_random_are_not_drawn_again(learning, monkeypatch):
    """Under QDrop a second forward pass would see other ones."""
    processor, operands = learning
    for quantizer in processor.quantizers.values():
        quantizer.drop_probability, quantizer.noise = 0.5, SampleNoise(0, 0, range(2))
    monkeypatch.setattr(attention, "MOST_SCORES", 2 * LENGTH**2)
    _, seen = results(processor, operands, None)
    assert seen == HEADS * [2 * LENGTH**2]
