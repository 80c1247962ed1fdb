"""Properties of the arithmetic over widths, shapes, dtypes and magnitudes."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepquant.core.affine import (
    SMALLEST_SCALE,
    affine_from_range,
    dequantize,
    fake_quantize,
    largest_code,
    quantize,
)
from stepquant.core.packing import pack, packed_bytes, unpack
from stepquant.core.ranges import find_range
from stepquant.layers.clock import StepClock

bits = st.integers(2, 8)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 7]), max_size=3)
seeds = st.integers(0, 1 << 30)
magnitudes = st.floats(-30, 30)
few = settings(max_examples=60, deadline=None)


def random(shape: list[int], seed: int, magnitude: float = 0.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**magnitude


@given(shapes, seeds, magnitudes, bits, dtypes, st.booleans())
@few
def test_codes_fit_their_bits_and_shapes_and_dtypes_are_preserved(shape, seed, magnitude, width, dtype, symmetric):
    x = random(shape, seed, magnitude)
    ends = (x.min(), x.max()) if x.numel() else (torch.tensor(0.0), torch.tensor(0.0))
    scale, zero_point = affine_from_range(*ends, width, symmetric=symmetric)
    assert math.isfinite(scale) and scale >= SMALLEST_SCALE
    assert 0 <= zero_point <= largest_code(width) and zero_point == zero_point.round()
    codes = quantize(x, scale, zero_point, width)
    assert codes.shape == x.shape
    assert not x.numel() or (codes.min() >= 0 and codes.max() <= largest_code(width))
    assert torch.equal(codes, codes.round())
    # Activations of half the width are quantized in float32, as the layers do it, and come back in their own dtype.
    narrow = x.clamp(-6e4, 6e4).to(dtype)
    back = fake_quantize(narrow.float(), scale, zero_point, width).to(dtype)
    assert back.dtype == dtype and back.shape == narrow.shape


@given(seeds, st.floats(-6, 30), bits, st.booleans())
@few
def test_error_is_bounded_by_the_step_at_any_magnitude(seed, magnitude, width, symmetric):
    x = random([50], seed, magnitude)
    scale, zero_point = affine_from_range(x.min(), x.max(), width, symmetric=symmetric)
    error = (fake_quantize(x, scale, zero_point, width) - x).abs().max()
    assert error <= float(scale) * (0.5 if symmetric else 1.0) * (1 + 1e-5)


@given(seeds, magnitudes, bits)
@few
def test_quantization_is_monotone_and_idempotent(seed, magnitude, width):
    x = random([60], seed, magnitude).sort().values
    scale, zero_point = affine_from_range(x[5], x[-5], width)
    codes = quantize(x, scale, zero_point, width)
    assert bool((codes.diff() >= 0).all())
    assert torch.equal(quantize(dequantize(codes, scale, zero_point), scale, zero_point, width), codes)
    again = fake_quantize(fake_quantize(x, scale, zero_point, width), scale, zero_point, width)
    assert torch.equal(again, fake_quantize(x, scale, zero_point, width))


@given(seeds, st.floats(0, 30), bits)
@few
def test_scaling_by_a_power_of_two_scales_the_result(seed, exponent, width):
    """Such scaling is exact, so codes must not change."""
    x, factor = random([40], seed), 2.0 ** round(exponent)
    scale, zero_point = affine_from_range(x.min(), x.max(), width)
    larger = affine_from_range(x.min() * factor, x.max() * factor, width)
    assert torch.equal(larger[0], scale * factor) and torch.equal(larger[1], zero_point)
    assert torch.equal(quantize(x * factor, *larger, width), quantize(x, scale, zero_point, width))


@given(seeds, magnitudes, bits, st.sampled_from(["minmax", "least-error"]), st.booleans())
@few
def test_ranges_lie_within_the_data_widened_to_zero(seed, magnitude, width, method, symmetric):
    x = random([3, 30], seed, magnitude)
    low, high = find_range(x, width, method, symmetric=symmetric)
    assert bool((low <= high).all()) and bool(torch.isfinite(low).all()) and bool(torch.isfinite(high).all())
    slack = 1 + 1e-5
    assert bool((low >= x.amin(1).clamp(max=0) * slack).all()) and bool((high <= x.amax(1).clamp(min=0) * slack).all())


def test_range_as_wide_as_float32_has_finite_scale():
    """The difference of the ends, 6e38, overflows float32."""
    scale, zero_point = affine_from_range(torch.tensor(-3e38), torch.tensor(3e38), 8)
    assert torch.isfinite(scale) and 0 <= zero_point <= 255
    assert torch.isfinite(fake_quantize(torch.tensor([-3e38, 0.0, 3e38]), scale, zero_point, 8)).all()


@given(bits, shapes, seeds)
@few
def test_packing_is_lossless_and_has_the_computed_size(width, shape, seed):
    codes = torch.randint(0, 1 << width, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, width)
    assert packed.dtype == torch.uint8 and packed.numel() == packed_bytes(codes.numel(), width)
    assert torch.equal(unpack(packed, codes.shape, width), codes)
    assert torch.equal(pack(unpack(packed, codes.shape, width), width), packed)


times = st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=20, unique=True)


@given(times, st.lists(st.floats(-10, 1100, width=32), min_size=1, max_size=8))
@few
def test_clock_is_monotone_and_equal_for_batches_and_samples(grid, requested):
    clock = StepClock(torch.tensor(sorted(grid)))
    rows = []
    for time in sorted(requested):
        clock.set(time)
        rows.append(int(clock.row))
    assert rows == sorted(rows) and rows[0] >= 0 and rows[-1] < len(grid)
    clock.set(torch.tensor(sorted(requested)))
    assert clock.row.expand(len(requested)).tolist() == rows if clock.row.dim() == 0 else clock.row.tolist() == rows


@given(times)
@few
def test_calibrated_timesteps_have_their_own_row(grid):
    ordered = sorted(grid)
    clock = StepClock(torch.tensor(ordered))
    for row, time in enumerate(ordered):
        clock.set(time)
        assert clock.row == row
