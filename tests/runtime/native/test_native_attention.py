"""Integer attention against the simulated one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stepquant.core.dynamic import DynamicFormat
from stepquant.core.qtensor import GridFormat
from stepquant.errors import StepquantError
from stepquant.layers.attention import QuantizedAttentionProcessor
from stepquant.layers.clock import StepClock
from stepquant.layers.format import OPERANDS
from stepquant.runtime.native.attention import NativeAttention
from stepquant.runtime.native.build import available

pytestmark = pytest.mark.usefixtures("kernels")
STEPS = 3


def processor(zero_of_probability: int = 0) -> QuantizedAttentionProcessor:
    formats = dict.fromkeys(OPERANDS, GridFormat(bits=8, rows=STEPS))
    result = QuantizedAttentionProcessor(formats, StepClock(torch.arange(STEPS).float()))
    for name in OPERANDS:
        reach = 1.0 if name == "probability" else 6.0
        zero_point = torch.randint(1, 255, (STEPS, 1, 1))
        if name == "probability":
            zero_point = torch.full((STEPS, 1, 1), zero_of_probability)
        setattr(result, f"{name}_scale", (torch.rand(STEPS, 1, 1) + 0.5) * reach / 255)
        setattr(result, f"{name}_zero_point", zero_point.byte())
    return result


@pytest.mark.parametrize("zero_point", [0, 5])
@pytest.mark.parametrize("row", [torch.tensor(1), torch.tensor([2, 0])], ids=["one step", "mixed steps"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 64, 64, 32), (3, 5, 7, 9), (2, 33, 65, 40), (2, 70, 77, 160), (1, 1, 1, 1)])
def test_attention(shape, masked, row, zero_point):
    """Equal to float rounding, except where a probability at a tie differs by one code."""
    torch.manual_seed(0)
    heads, length, keys, size = shape
    simulated = processor(zero_point)
    simulated.clock.row = row
    query, key, value = (torch.randn(2, heads, count, size) for count in (length, keys, keys))
    mask = torch.randn(2, 1, 1, keys) if masked else None
    expected = simulated.attend(query, key, value, mask)
    step = float(simulated.probability_scale.max()) * float(value.abs().max())
    for instructions in available():
        found = NativeAttention(simulated, instructions=instructions)(query, key, value, mask, row)
        error = (found - expected).abs()
        assert (error > 1e-5 * expected.abs().max()).float().mean() < 0.01
        assert error.max() <= 1.5 * step


@pytest.mark.parametrize("hidden", ["boolean", "-inf", "smallest", "-1e4"])
@pytest.mark.parametrize("shape", [(37, 45), (1, 45), (2, 1, 1, 45), (2, 1, 37, 45), (3, 37, 45), (2, 3, 37, 45)])
def test_masks(shape, hidden):
    """As torch attends with the quantized operands, to what rounding the probabilities to 8 bits can change."""
    torch.manual_seed(0)
    simulated = processor()
    query, key, value = (torch.randn(2, 3, count, 8) for count in (37, 45, 45))
    mask = torch.rand(shape) < 0.5
    mask[..., 0] = True
    mask[..., -1, :] = False  # a query that attends to nothing
    if hidden != "boolean":
        number = {"-inf": -torch.inf, "smallest": torch.finfo(torch.float32).min, "-1e4": -1e4}[hidden]
        mask = torch.zeros(shape).masked_fill(~mask, number)
    operands = [simulated.operand(name, x) for name, x in zip(OPERANDS, (query, key, value), strict=False)]
    expected = F.scaled_dot_product_attention(*operands, attn_mask=mask)
    found = NativeAttention(simulated)(query, key, value, mask, torch.tensor(0))
    step = float(simulated.probability_scale[0]) * float(value.abs().max())
    assert (found - expected).abs().max() <= 8 * step
    if hidden in ("boolean", "-inf"):
        assert bool((found[..., -1, :] == 0).all())


def test_mask_of_another_shape():
    query, key, value = torch.randn(3, 2, 2, 4, 8)
    with pytest.raises(StepquantError, match=r"mask has shape \[3, 4\]; expected .* \[2, 2, 4, 4\]"):
        NativeAttention(processor())(query, key, value, torch.zeros(3, 4), torch.tensor(0))


def test_row_that_the_tables_do_not_have():
    query, key, value = torch.randn(3, 2, 2, 4, 8)
    for row in (torch.tensor(STEPS), torch.tensor([0, STEPS])):
        with pytest.raises(StepquantError, match="the clock is at row 3; expected one of the 3 rows"):
            NativeAttention(processor())(query, key, value, None, row)


def test_operands_of_any_layout_and_dtype():
    simulated = processor()
    query = torch.randn(2, 6, 3, 8).transpose(1, 2)
    key, value = torch.randn(2, 3, 8, 5).transpose(2, 3), torch.randn(2, 3, 5, 8).double()
    expected = simulated.attend(query, key, value.float(), None)
    torch.testing.assert_close(NativeAttention(simulated)(query, key, value, None, torch.tensor(0)), expected)
    wide = NativeAttention(simulated)(query.double(), key, value, None, torch.tensor(0))
    torch.testing.assert_close(wide, expected.double())


def test_one_operand_in_float_cannot_run():
    formats = dict.fromkeys(("query", "key", "value"), GridFormat(bits=8))
    assert not NativeAttention.supports(QuantizedAttentionProcessor(formats, StepClock()))


@pytest.mark.parametrize("key", [(3, 2, 5, 8), (2, 1, 5, 8), (2, 2, 5, 9), (2, 2, 6, 8)])
def test_operands_that_do_not_fit(key):
    query, value = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 5, 8)
    with pytest.raises(StepquantError, match="expected query, key and value of the same"):
        NativeAttention(processor())(query, torch.randn(key), value, None, torch.tensor(0))
    with pytest.raises(StepquantError, match="on meta"):
        NativeAttention(processor())(query, value.to("meta"), value, None, torch.tensor(0))
    with pytest.raises(StepquantError, match="3 timesteps were given for a batch of 2"):
        NativeAttention(processor())(query, value, value, None, torch.tensor([0, 1, 2]))


def test_one_context_of_all_samples():
    simulated = processor()
    query, key, value = torch.randn(3, 2, 4, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    expected = simulated.attend(query, key, value, None)
    torch.testing.assert_close(NativeAttention(simulated)(query, key, value, None, torch.tensor(0)), expected)


def test_other_defaults_of_torch():
    simulated, row = processor(), torch.tensor(0)
    query, key, value = (torch.randn(2, 2, 4, 8) for _ in range(3))
    expected = NativeAttention(simulated)(query, key, value, None, row)
    with torch.device("meta"):
        assert torch.equal(NativeAttention(simulated)(query, key, value, None, row), expected)


@torch.no_grad()
@pytest.mark.parametrize("keys", [33_025, 40_000])
def test_sums_that_a_kernel_cannot_hold(keys):
    """All probabilities and values have the largest code: with more than 33,025 keys the sum of products overflows."""
    simulated = processor()
    simulated.probability_scale.fill_(1 / keys / 255)
    simulated.value_scale.fill_(1 / 255)
    simulated.value_zero_point.fill_(0)
    query, key, value = torch.randn(1, 1, 2, 4), torch.zeros(1, 1, keys, 4), torch.ones(1, 1, keys, 4)
    simulated.kernel = NativeAttention(simulated)
    assert simulated.kernel.fits(query, key) == (keys == 33_025)
    torch.testing.assert_close(simulated.attend(query, key, value, None), torch.ones(1, 1, 2, 4), atol=0.01, rtol=0)


def test_wide_heads_do_not_fit():
    kernel = NativeAttention(processor())
    assert kernel.fits(torch.empty(1, 1, 1, 16_512), torch.empty(1, 1, 1, 16_512))
    assert not kernel.fits(torch.empty(1, 1, 1, 16_513), torch.empty(1, 1, 1, 16_513))


def dynamic_processor(bits: int = 8) -> QuantizedAttentionProcessor:
    return QuantizedAttentionProcessor(dict.fromkeys(OPERANDS, DynamicFormat(bits=bits)), StepClock())


def by_definition(query, key, value, mask, bits):
    """Dynamic attention in int64 and float64, token by token."""

    def codes(x):
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / (2**bits - 1)
        zero_point = torch.round(-low / scale)
        return ((x * (1 / scale)).round() + zero_point).long() - zero_point.long(), scale.double()

    (query, query_scale), (key, key_scale), (value, scale) = (codes(x) for x in (query, key, value))
    products = (query[..., :, None, :] * key[..., None, :, :]).sum(-1)
    scores = products * query_scale * key_scale.transpose(-1, -2) / query.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + mask
    share = (scores.softmax(-1) * scale.transpose(-1, -2)).float()
    peak = share.amax(-1, keepdim=True)
    rounded = (share / peak * (2**bits - 1)).round().long()
    sums = (rounded[..., None] * value[..., None, :, :]).sum(-2)
    return (sums * (peak / (2**bits - 1)).double()).float(), float(peak.max()) * float(value.abs().max()) / 2**bits


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 64, 64, 32), (3, 5, 7, 9), (2, 33, 65, 40), (2, 20, 77, 160), (1, 1, 1, 1)])
def test_dynamic_grids(shape, masked, bits):
    """Of each token and head, and each row of probabilities; equal except where a probability is at a tie."""
    torch.manual_seed(0)
    heads, length, keys, size = shape
    # Tokens of very different sizes, and none centered.
    query, key, value = (
        (torch.randn(2, heads, count, size) + torch.randn(size)) * torch.rand(2, heads, count, 1).exp2()
        for count in (length, keys, keys)
    )
    mask = torch.randn(2, 1, 1, keys) if masked else None
    expected, step = by_definition(query, key, value, mask, bits)
    simulated = dynamic_processor(bits)
    assert NativeAttention.supports(simulated)
    for instructions in available():
        kernel = NativeAttention(simulated, instructions=instructions)
        for found in (kernel(query, key, value, mask, torch.tensor(0)), simulated.attend(query, key, value, mask)):
            error = (found - expected).abs()
            assert (error > 1e-5 * expected.abs().max()).float().mean() < 0.01
            assert error.max() <= 1.5 * step


def test_dynamic_grids_of_empty_rows_and_zero_values():
    query, key, value = torch.randn(3, 2, 3, 9, 8).unbind()
    mask = torch.zeros(2, 3, 9, 9)
    mask[:, :, 4] = -torch.inf
    value[1, 2] = 0
    found = NativeAttention(dynamic_processor())(query, key, value, mask, torch.tensor(0))
    assert bool((found[:, :, 4] == 0).all() and (found[1, 2] == 0).all() and (found[0, :, 5] != 0).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("operand", ["query", "key", "value", "mask"])
def test_nan_with_dynamic_grids(operand, value):
    operands = {name: torch.randn(2, 3, 37, 8) for name in ("query", "key", "value")}
    operands["mask"] = torch.randn(2, 3, 37, 37)
    clean = NativeAttention(dynamic_processor())(*operands.values(), torch.tensor(0))
    operands[operand][1, 0, 3, 2] = value
    found = NativeAttention(dynamic_processor())(*operands.values(), torch.tensor(0))
    expected = torch.zeros(2, 3, 37, 8, dtype=torch.bool)
    expected[1, 0, slice(3, 4) if operand in ("query", "mask") else slice(None)] = True
    assert torch.equal(found.isnan(), expected)
    assert torch.equal(found[~expected], clean[~expected])
