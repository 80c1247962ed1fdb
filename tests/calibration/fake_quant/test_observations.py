import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepquant.calibration.fake_quant import observations
from stepquant.calibration.fake_quant.observations import MOST_VALUES, VALUES_PER_SAMPLE, Observations


def observed(x: torch.Tensor, rows: torch.Tensor, cuts: list[int], table_rows: int) -> Observations:
    """x [N, 2, n], seen in the batches that end at `cuts`."""
    seen = Observations(table_rows, 2)
    for start, stop in zip([0, *cuts], [*cuts, len(x)], strict=True):
        if stop > start:
            seen.add(rows[start:stop], list(x[start:stop].unbind(1)))
    return seen


@given(st.lists(st.integers(0, 40), max_size=6), st.sampled_from([1, 3]), st.sampled_from([7, 300, 5000]))
@settings(max_examples=30, deadline=None)
def test_batching_does_not_matter(cuts, rows, size):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(40, 2, size, generator=generator)
    row = torch.randint(0, rows, (40,), generator=generator)
    whole, split = observed(x, row, [], rows), observed(x, row, sorted(cuts), rows)
    assert torch.equal(whole.low, split.low) and torch.equal(whole.high, split.high)
    for wanted in (None, *whole.rows):
        assert torch.equal(whole.values(wanted), split.values(wanted))


@given(st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_merged_observations_equal_those_of_one_process(processes):
    x = torch.randn(40, 2, 5000, generator=torch.Generator().manual_seed(processes))
    rows = torch.arange(40) % 3
    parts = [observed(part, row, [], 3) for part, row in zip(x.chunk(processes), rows.chunk(processes), strict=True)]
    merged = Observations(3, 2)
    merged.merge([part.parts() for part in parts])
    whole = observed(x, rows, [], 3)
    assert torch.equal(whole.low, merged.low) and torch.equal(whole.high, merged.high)
    assert all(torch.equal(whole.values(row), merged.values(row)) for row in (None, 0, 1, 2))


def test_memory_is_bounded_and_the_range_exact():
    seen = Observations(1, 1)
    for start in range(0, 400, 8):
        seen.add(torch.zeros(8, dtype=torch.long), [torch.arange(start * 100.0, (start + 8) * 100).reshape(8, 100)])
        assert seen.values().numel() <= MOST_VALUES
    assert (seen.low.item(), seen.high.item()) == (0, 39_999)
    many = Observations(1, 1)
    for _ in range(3):
        many.add(torch.zeros(16, dtype=torch.long), [torch.randn(16, 20_000)])
    assert MOST_VALUES // 2 < many.values().numel() <= MOST_VALUES


def test_recorded_values_are_spread_over_the_sample():
    """Not a regular grid, which would meet the same pixel of every row of an image."""
    seen = Observations(1, 1)
    seen.add(torch.zeros(1, dtype=torch.long), [torch.arange(64 * 1024.0)[None]])
    places = seen.values()[0].long()
    assert len(places.unique()) == VALUES_PER_SAMPLE
    columns = torch.bincount(places % 32, minlength=32)
    assert columns.min() > 0.6 * columns.max()


def test_samples_keep_equal_weight(monkeypatch):
    monkeypatch.setattr(observations, "MOST_VALUES", 64)
    seen = Observations(1, 1)
    for sample in range(10):
        seen.add(torch.zeros(1, dtype=torch.long), [torch.full((1, 100), float(sample))])
    counts = torch.bincount(seen.values()[0].long())
    assert counts.tolist() == [4] * 10
