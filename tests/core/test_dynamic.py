"""Dynamic grids against the definition, written with NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stepquant.core.dynamic import DynamicGrid


def plain(values: np.ndarray, bits: int) -> tuple[np.float32, np.float32]:
    """Scale and zero point of the values that share them."""
    low, high = min(values.min(), 0), max(values.max(), 0)
    scale = np.maximum(np.float32(high - low) / np.float32(2**bits - 1), np.float32(1e-8))
    return scale, np.clip(np.rint(-low / scale), 0, 2**bits - 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 4, 100])
@pytest.mark.parametrize("shape, channel_dim", [((2, 3, 10), -1), ((2, 10, 3, 3), 1), ((5, 10), -1)])
def test_every_group_of_a_position_has_the_range_of_its_values(shape, channel_dim, group, bits):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    scale, zero_point = (
        each.expand(shape).movedim(channel_dim, -1).reshape(-1, 10).numpy()
        for each in DynamicGrid(bits, group).of(x, channel_dim)
    )
    size = min(group or 10, 10)
    for row, values in enumerate(x.movedim(channel_dim, -1).reshape(-1, 10).numpy()):
        for start in range(0, 10, size):
            expected = plain(values[start : start + size], bits)
            assert np.allclose(scale[row, start : start + size], expected[0], rtol=1e-6)
            assert (zero_point[row, start : start + size] == expected[1]).all()


def test_zeros_have_a_grid():
    scale, zero_point = DynamicGrid(8).of(torch.zeros(2, 4))
    assert bool((scale > 0).all()) and bool((zero_point == 0).all())
