import numpy as np
import torch

from stepquant.core import ranges
from stepquant.core.affine import affine_from_range, fake_quantize
from stepquant.core.ranges import find_range, least_error_gain, least_error_range, minmax_range


def plain_search(x: np.ndarray, bits: int) -> tuple[float, float]:
    """The search written out for one row, in float64."""
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    best = (np.inf, low, high)
    for step in range(100, 0, -1):
        a, b = low * step / 100, high * step / 100
        scale = (b - a) / (2**bits - 1)
        zero = np.clip(np.round(-a / scale), 0, 2**bits - 1)
        rounded = (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale
        error = (np.abs(rounded - x) ** 2.4).mean()
        if error < best[0]:
            best = (error, a, b)
    return best[1], best[2]


def test_least_error_matches_exhaustive_search():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 500, generator=generator) * torch.tensor([[0.1], [1], [5], [20]])
    low, high = least_error_range(values, 4)
    for row in range(4):
        a, b = plain_search(values[row].double().numpy(), 4)
        assert abs(low[row] - a) < 1e-4 * abs(a) and abs(high[row] - b) < 1e-4 * abs(b)


def test_least_error_clips_a_heavy_tail_but_not_a_uniform():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(1, 4000, generator=generator)
    values[0, 0] = 40

    def error(low, high):
        scale, zero_point = affine_from_range(low, high, 4)
        return (fake_quantize(values, scale[:, None], zero_point[:, None], 4) - values).abs().pow(2.4).mean()

    assert error(*find_range(values, 4, "least-error")) < 0.8 * error(*find_range(values, 4, "minmax"))
    flat = torch.linspace(-1, 1, 4001)[None]
    low, high = least_error_range(flat, 8)
    assert low < -0.97 and high > 0.97


def test_searching_rows_in_parts_gives_the_same_ranges(monkeypatch):
    torch.manual_seed(0)
    values = torch.randn(7, 500) * torch.rand(7, 1)
    whole = least_error_range(values, 4), least_error_range(values, 8, low=values.amin(1) - 1, high=values.amax(1) + 1)
    monkeypatch.setattr(ranges, "AT_ONCE", 1000)
    parts = least_error_range(values, 4), least_error_range(values, 8, low=values.amin(1) - 1, high=values.amax(1) + 1)
    assert all(
        torch.equal(*ends) for one, other in zip(whole, parts, strict=True) for ends in zip(one, other, strict=True)
    )


def test_given_ends_are_used():
    sample = torch.tensor([[0.0, 0.5]])
    low, high = find_range(sample, 8, "minmax", low=torch.tensor([-3.0]), high=torch.tensor([4.0]))
    assert (low.item(), high.item()) == (-3, 4)
    assert minmax_range(sample)[1].item() == 0.5


def test_least_error_gain_beats_its_neighbours():
    torch.manual_seed(0)
    values = torch.randn(3, 2000) * torch.tensor([0.5, 1.0, 2.0])[:, None]
    scale, zero_point = torch.full((3,), 0.3), torch.full((3,), 8.0)
    gain = least_error_gain(values, scale, zero_point, 4)
    assert bool((gain.diff() > 0).all()), "wider values take a wider grid"

    def error(candidate):
        rounded = fake_quantize(values, (scale * candidate)[:, None], zero_point[:, None], 4)
        return (rounded - values).abs().pow(2.4).mean(dim=1)

    for factor in (0.5, 0.75, 1.0, 1.33, 2.0):
        assert bool((error(gain) <= 1.02 * error(gain * factor)).all())
