import torch

from stepquant.core.noise import SampleNoise


def test_noise_of_a_sample_does_not_depend_on_the_batch():
    x = torch.zeros(6, 3, 5)
    whole = SampleNoise(7, 3, range(6))
    first, second = whole.uniform(x), whole.uniform(torch.zeros(12, 4))
    assert bool(((first >= 0) & (first < 1)).all()) and len(first.unique()) == first.numel()
    for places in (range(2), range(2, 6), range(5, 6)):
        part = SampleNoise(7, 3, places)
        assert torch.equal(part.uniform(x[: len(places)]), first[places.start : places.stop])
        # [B', ...]: two rows a sample, which stay together.
        rows = slice(2 * places.start, 2 * places.stop)
        assert torch.equal(part.uniform(torch.zeros(2 * len(places), 4)), second[rows])


def test_noise_differs_between_iterations_and_seeds():
    x = torch.zeros(1, 50)
    drawn = [SampleNoise(seed, iteration, range(1)).uniform(x) for seed in (0, 1) for iteration in (0, 1)]
    assert len(torch.cat(drawn).unique()) > 190


def test_noise_is_uniform_across_samples():
    numbers = SampleNoise(0, 0, range(4000)).uniform(torch.zeros(4000, 2))
    assert abs(float(numbers.mean()) - 0.5) < 0.02
    assert abs(float(numbers.var()) - 1 / 12) < 0.004
