"""Attention quantized by intercepting `scaled_dot_product_attention`, against the model without it and SDPA itself."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny_denoisers
import torch
import torch.nn.functional as F
from diffusers import attention_backend
from torch import nn
from torch.overrides import TorchFunctionMode

from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.layers import CalibratedAttention
from stepquant.core.affine import fake_quantize
from stepquant.core.qtensor import Grid, GridFormat, QuantizedAttention
from stepquant.errors import StepquantError
from stepquant.layers.attention import AttentionProcessor, QuantizedAttentionProcessor
from stepquant.layers.clock import StepClock
from stepquant.layers.format import OPERANDS
from stepquant.layers.install import Quantization, install, install_empty
from stepquant.layers.interception import CALLS, install_attention, quantized_attentions
from stepquant.layers.scaled_dot_product import ScaledDotProduct

FORMATS = {name: GridFormat(bits=8) for name in OPERANDS}


def attentions_of(model: nn.Module, call: dict) -> list[str]:
    """Names of the attentions that a call executes: the innermost module, and which of its calls it is."""
    names = {module: name for name, module in model.named_modules()}
    inside: list[nn.Module] = []
    counts: list[int] = []
    found: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                found.append(names[inside[-1]] + (f":{counts[-1]}" if counts[-1] else ""))
                counts[-1] += 1
            return func(*args, **(kwargs or {}))

    def enter(module, _):
        inside.append(module)
        counts.append(0)

    def leave(*_):
        inside.pop()
        counts.pop()

    handles = [module.register_forward_pre_hook(enter) for module in model.modules()]
    handles += [module.register_forward_hook(leave) for module in model.modules()]
    with Watch(), torch.no_grad():
        model(**call)
    for handle in handles:
        handle.remove()
    return found


def main_output(model: nn.Module, call: dict) -> torch.Tensor:
    output = model(**call, return_dict=False)[0]
    return output if isinstance(output, torch.Tensor) else output[0]


@torch.no_grad()
@pytest.mark.parametrize("name", tiny_denoisers.BUILDERS)
def test_attention_without_quantizers_is_the_model_itself(name, monkeypatch):
    """Every attention is computed here, with explicit scores; the output is the original's."""
    model, call = tiny_denoisers.build(name)
    expected = main_output(model, call)
    attentions = attentions_of(model, call)
    assert len(set(attentions)) == len(attentions)
    computed: list[int] = []
    attend = ScaledDotProduct._attend_heads
    monkeypatch.setattr(ScaledDotProduct, "_attend_heads", lambda *args: computed.append(1) or attend(*args))
    for attention in attentions:
        install_attention(model, attention, AttentionProcessor())
    produced = main_output(model, call)
    assert len(computed) == len(attentions) > 0
    assert (produced - expected).abs().max() <= 1e-6 * expected.abs().max().clamp(min=1)


def test_second_call_within_a_forward():
    model, call = tiny_denoisers.build("wan_image")
    assert "blocks.0.attn2" in attentions_of(model, call) and "blocks.0.attn2:1" in attentions_of(model, call)


class Caller(nn.Module):
    """Calls SDPA with any arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Identity()

    def forward(self, *args, **kwargs):
        return F.scaled_dot_product_attention(*args, **kwargs)


def quantized(bits: int = 8, rows: int = 1) -> QuantizedAttention:
    def grid(low: float, high: float, count: int) -> Grid:
        scale = (high - low) / (2**bits - 1) * torch.linspace(1, 1.5, count)
        zero_point = (-low / scale).round().to(torch.uint8)
        return Grid(scale.reshape(-1, 1, 1), zero_point.reshape(-1, 1, 1), bits)

    return QuantizedAttention(grid(-3, 3, rows), grid(-3, 3, rows), grid(-3, 3, rows), grid(0, 1, rows))


def install_quantized(model: nn.Module, names: list[str], rows: int = 1) -> QuantizedAttention:
    attention = quantized(rows=rows)
    install(model, Quantization(torch.arange(rows).float(), {}, dict.fromkeys(names, attention)))
    return attention


ARGUMENTS = {
    "plain": ((2, 3, 5, 8), (2, 3, 7, 8), {}),
    "boolean mask": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": torch.rand(2, 1, 5, 7) < 0.7}),
    "additive mask": ((2, 3, 5, 8), (2, 3, 7, 8), {"attn_mask": tiny_denoisers.normal(5, 7)}),
    "causal": ((2, 3, 5, 8), (2, 3, 7, 8), {"is_causal": True}),
    "scale": ((2, 3, 5, 8), (2, 3, 7, 8), {"scale": 0.5}),
    "grouped queries": ((2, 6, 5, 8), (2, 2, 7, 8), {"enable_gqa": True}),
    "three dimensions": ((4, 5, 8), (4, 7, 8), {"attn_mask": torch.rand(4, 5, 7) < 0.7}),
    "five dimensions": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), {"attn_mask": torch.rand(2, 1, 1, 5, 7) < 0.7}),
}


@torch.no_grad()
@pytest.mark.parametrize("case", ARGUMENTS)
def test_quantized_operands(case):
    """Against SDPA on operands quantized before it, the probabilities left in floating point."""
    query_shape, key_shape, arguments = ARGUMENTS[case]
    query, key, value = (tiny_denoisers.normal(*shape) for shape in (query_shape, key_shape, key_shape))
    model = nn.ModuleDict({"attention": Caller()})
    grids = quantized()
    exact = QuantizedAttention(grids.query, grids.key, grids.value, None)
    install(model, Quantization(torch.zeros(1), {}, {"attention": exact}))
    operands = [
        fake_quantize(x, grid.scale[0, 0, 0], grid.zero_point[0, 0, 0].float(), 8)
        for x, grid in zip((query, key, value), (grids.query, grids.key, grids.value), strict=True)
    ]
    expected = F.scaled_dot_product_attention(*operands, **arguments)
    assert not torch.equal(expected, F.scaled_dot_product_attention(query, key, value, **arguments))
    torch.testing.assert_close(model["attention"](query, key, value, **arguments), expected, atol=2e-6, rtol=0)
    keywords = {"query": query, "key": key, "value": value} | arguments
    torch.testing.assert_close(model["attention"](**keywords), expected, atol=2e-6, rtol=0)


@torch.no_grad()
def test_grids_follow_the_step():
    model = nn.ModuleDict({"attention": Caller()})
    install_quantized(model, ["attention"], rows=2)
    processor = quantized_attentions(model)["attention"]
    operands = [tiny_denoisers.normal(2, 1, 5, 8) for _ in range(3)]
    outputs = []
    for time in (torch.tensor(0.0), torch.tensor(1.0), torch.tensor([0.0, 1.0])):
        processor.clock.set(time)
        outputs.append(model["attention"](*operands))
    assert not torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], torch.stack([outputs[0][0], outputs[1][1]]))


@contextmanager
def plain_attention_afterwards() -> Iterator[None]:
    """Check that calls outside of the module are torch's again."""
    operands = [tiny_denoisers.normal(1, 1, 4, 8) for _ in range(3)]
    expected = F.scaled_dot_product_attention(*operands)
    yield
    assert torch.equal(F.scaled_dot_product_attention(*operands), expected)


class Failing(Caller):
    def forward(self, error, *args):
        raise error


@pytest.mark.parametrize("error", [ValueError(), KeyboardInterrupt()])
def test_an_exception_ends_the_interception(error):
    model = nn.ModuleDict({"attention": Failing()})
    install_quantized(model, ["attention"])
    with plain_attention_afterwards(), pytest.raises(type(error)):
        model["attention"](error)


@torch.no_grad()
def test_other_threads_are_not_affected():
    operands = [tiny_denoisers.normal(1, 1, 4, 8) for _ in range(3)]
    expected = F.scaled_dot_product_attention(*operands)
    seen: list[torch.Tensor] = []

    class Waiting(Caller):
        def forward(self, *args):
            thread = threading.Thread(target=lambda: seen.append(F.scaled_dot_product_attention(*operands)))
            thread.start()
            thread.join()
            return super().forward(*args)

    model = nn.ModuleDict({"attention": Waiting()})
    install_quantized(model, ["attention"])
    assert not torch.equal(model["attention"](*operands), expected)
    assert torch.equal(seen[0], expected)


@torch.no_grad()
def test_checkpoint_by_name():
    model, call = tiny_denoisers.build("wan_image")
    original = copy.deepcopy(model)
    names = attentions_of(model, call)
    install_quantized(model, names, rows=2)
    assert list(quantized_attentions(model)) == sorted(names)
    state = model.state_dict()
    key = f"blocks.0.attn2.{CALLS}.1.query_scale"
    assert state[key].shape == (2, 1, 1)
    formats = {operand: GridFormat(bits=8, rows=2) for operand in OPERANDS}
    loaded = copy.deepcopy(original)
    install_empty(loaded, {"timesteps": [0.0, 1.0], "layers": {}, "attentions": dict.fromkeys(names, formats)})
    loaded.load_state_dict(state)
    expected = model(**call).sample
    assert torch.equal(loaded(**call).sample, expected)
    assert not torch.equal(original(**call).sample, expected)
    assert torch.equal(copy.deepcopy(loaded)(**call).sample, expected)
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(**call).sample, expected)


def test_a_copy_has_its_own_grids():
    model, call = tiny_denoisers.build("flux2")
    install_quantized(model, attentions_of(model, call))
    expected = main_output(model, call)
    copied = copy.deepcopy(model)
    for attention in quantized_attentions(copied).values():
        attention.query_scale *= 4
    assert not torch.equal(main_output(copied, call), expected)
    assert torch.equal(main_output(model, call), expected)


def test_a_layer_is_not_an_attention():
    model = nn.ModuleDict({"linear": nn.Linear(2, 2)})
    for name, message in (("linear", "'linear' is a Linear; expected an attention"), ("other:1", "no layer 'other'")):
        with pytest.raises(StepquantError, match=message):
            install_quantized(model, [name])


@torch.no_grad()
def test_another_attention_backend_is_announced():
    model, call = tiny_denoisers.build("flux2")
    install_quantized(model, attentions_of(model, call))
    expected = main_output(model, call)
    with attention_backend("_native_math"):
        torch.testing.assert_close(main_output(model, call), expected)
    message = "without torch's scaled_dot_product_attention"
    with attention_backend("flex"), pytest.warns(UserWarning, match=message):
        main_output(model, call)


def test_calibration_by_the_same_mechanism():
    """Points observe the operands of the call, and gradients reach scales that learn."""
    model, call = tiny_denoisers.build("lumina2")
    expected = main_output(model, call)
    clock = StepClock()
    attentions = {
        name: CalibratedAttention({n: ActivationPoint(8, clock, unsigned=n == "probability") for n in OPERANDS})
        for name in attentions_of(model, call)
    }
    points = [point for attention in attentions.values() for point in attention.points.values()]
    for name, attention in attentions.items():
        install_attention(model, name, attention)
    for point in points:
        point.observe()
    with torch.no_grad():
        torch.testing.assert_close(main_output(model, call), expected, atol=1e-6, rtol=1e-6)
    for point in points:
        point.calibrate("minmax")
    with torch.no_grad():
        produced = main_output(model, call)
    error = (produced - expected).norm() / expected.norm()
    assert 0 < error < 0.03
    learned = [parameter for point in points for parameter in point.learn_table()]
    main_output(model, call).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in learned)
    for point in points:
        point.freeze()
    loaded, _ = tiny_denoisers.build("lumina2")
    grids = {name: attention.to_quantized() for name, attention in attentions.items()}
    install(loaded, Quantization(torch.zeros(1), {}, grids))
    with torch.no_grad():
        torch.testing.assert_close(main_output(loaded, call), main_output(model, call), atol=1e-6, rtol=1e-6)


def test_operands_that_stay_in_floating_point():
    """A processor without grids, as an IP-Adapter creates it, computes torch's attention."""
    operands = [tiny_denoisers.normal(1, 1, 4, 8) for _ in range(3)]
    model = nn.ModuleDict({"attention": Caller()})
    install_attention(model, "attention", QuantizedAttentionProcessor())
    torch.testing.assert_close(model["attention"](*operands), F.scaled_dot_product_attention(*operands))
