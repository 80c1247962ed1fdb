import pytest
import torch

from stepquant.calibration.density import dense_and_diverse_steps, density, diversity, share_out
from stepquant.errors import StepquantError


def features(steps=12):
    torch.manual_seed(0)
    base = torch.randn(1, 2, 5, 8)
    out = base + 0.01 * torch.randn(steps, 2, 5, 8)  # alike,
    out[3] = torch.randn(2, 5, 8) * 3  # but for two
    out[7] = torch.randn(2, 5, 8) * 3
    return out


def test_density_counts_neighbours_and_diversity_sums_cosine_distances():
    values = features()
    assert float(density(values)[[3, 7]].max()) == 0
    expected = torch.zeros(12)
    for i in range(12):
        for j in range(12):
            if i != j:
                expected[i] += (1 - torch.cosine_similarity(values[i], values[j], dim=-1)).mean()
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    assert torch.allclose(diversity(values), expected, atol=1e-4)
    assert set(diversity(values).topk(2).indices.tolist()) == {3, 7}


@pytest.mark.parametrize("samples", [12, 13, 100, 1024])
def test_shares_sum_to_the_samples_and_stay_within_one(samples):
    weights = torch.rand(12, generator=torch.Generator().manual_seed(1))
    counts = share_out(weights, samples)
    assert int(counts.sum()) == samples
    assert float((counts - weights / weights.sum() * samples).abs().max()) < 1
    assert int(share_out(torch.zeros(5), 7).sum()) == 7


def test_more_weight_on_diversity_takes_more_of_the_odd_steps():
    def of(weight):
        steps = dense_and_diverse_steps(features(), 240, torch.Generator().manual_seed(0), weight)
        assert len(steps) == 240
        return int(((steps == 3) | (steps == 7)).sum())

    assert of(5.0) > of(0.2)


def test_too_few_samples_are_refused():
    with pytest.raises(StepquantError, match="at least one sample a step"):
        dense_and_diverse_steps(features(), 5, torch.Generator())
