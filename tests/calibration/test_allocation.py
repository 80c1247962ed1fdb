"""Mixed precision within a budget: never exceeded, nothing that fits left out, the most sensitive first."""

import pytest
import torch

import stepquant
from stepquant.calibration.allocation import exact_name, mean_weight_bits, parse_budget, within_budget
from stepquant.calibration.model import insert_fake_quantizers
from stepquant.calibration.sensitivity import Sensitivity
from stepquant.config import LayerBits, QuantSpec
from stepquant.errors import StepquantError
from tests.described import described

FRAGILE = "up_blocks.1.resnets.1.conv2"


def _sensitivity(errors, sizes, bits=None):
    names = [f"layer.{index}" for index in range(len(errors))]
    every = [LayerBits.parse(one) for one in (bits or ["w4a8"] * len(errors))]
    matrix = torch.tensor(errors, dtype=torch.float64)[:, None].expand(-1, 3)
    steps = ((0, 0), (1, 1), (2, 2))
    sized = dict(zip(names, sizes, strict=True))
    return Sensitivity("one-at-a-time", dict(zip(names, every, strict=True)), sized, steps, matrix, torch.ones(3))


def _kept(measured, budget):
    """Patterns of the layers of a w4a8 model that keep 8 bits."""
    return within_budget(QuantSpec.parse("w4a8"), measured, budget).overrides


def test_layers_are_chosen_by_error_per_weight():
    # Errors a weight: 0.05, 0.01, 0.04, 0.02.
    measured = _sensitivity([5.0, 4.0, 4.0, 2.0], [100, 400, 100, 100])
    names = {budget: list(_kept(measured, budget)) for budget in (4, 4.6, 5.2, 6, 8)}
    first, second, third, fourth = (rf"^layer\.{index}$" for index in (0, 2, 3, 1))
    assert names == {
        4: [],
        4.6: [first],
        5.2: [first, second],
        6: [first, second, third],
        8: [first, second, third, fourth],
    }
    assert _kept(measured, 4.6) == {first: "w8a8"}


def test_the_budget_is_used_up_and_never_exceeded():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        sizes = torch.randint(1, 1000, (12,), generator=generator).tolist()
        errors = (torch.rand(12, generator=generator) + 0.01).tolist()
        measured = _sensitivity(errors, sizes)
        budget = 4 + 4 * float(torch.rand(1, generator=generator))
        kept = _kept(measured, budget)
        after = {name: LayerBits.parse(kept.get(exact_name(name), str(bits))) for name, bits in measured.bits.items()}
        mean = mean_weight_bits(after, measured.sizes)
        assert mean <= budget
        smallest = min((size for name, size in measured.sizes.items() if after[name].weight == 4), default=None)
        assert smallest is None or mean + 4 * smallest / sum(sizes) > budget - 1e-9


def test_layers_with_other_bits_count_and_layers_without_error_are_skipped():
    measured = _sensitivity([9.0, 1.0, -1.0], [100, 100, 100], ["w8a8", "w4a8", "w4a8"])
    assert list(_kept(measured, 8)) == [r"^layer\.1$"]
    assert _kept(measured, 6) == {}
    with pytest.raises(StepquantError, match=r"expected 5\.334, .* to 8"):
        _kept(measured, 5.3)
    assert _kept(measured, 5.334) == {}


@pytest.mark.parametrize("budget", [3.9, 8.1, 0.0])
def test_budgets_that_cannot_be_met(budget):
    with pytest.raises(StepquantError, match=rf"budget of {budget:g} bits cannot be met; expected 4, .* to 8"):
        _kept(_sensitivity([1.0], [10]), budget)


def test_budgets_are_parsed():
    assert [parse_budget(text) for text in ("4.5bits", "4.5", " 5 Bits ", "4bit")] == [4.5, 4.5, 5.0, 4.0]
    for text in ("", "bits", "-4", "four", "4.5bytes", "nan", "1e9"):
        with pytest.raises(StepquantError, match="not understood"):
            parse_budget(text)


def test_the_spec_within_a_budget_reaches_the_layers(fragile_pipeline, tmp_path):
    spec = QuantSpec.parse({"bits": "w4a8", "overrides": {"conv_shortcut": "w6a8"}})
    measured = stepquant.sensitivity(fragile_pipeline, spec, workspace=tmp_path, calibration={"samples": 8, "steps": 4})
    chosen = within_budget(spec, measured, 5.5)
    assert next(iter(chosen.overrides)) == "conv_shortcut"
    unet = fragile_pipeline.unet
    layers = insert_fake_quantizers(unet, described(unet), chosen).layers
    bits = {name: layer.weight_point.bits for name, layer in layers.items()}
    assert bits[FRAGILE] == 8
    assert all(bits[name] == 6 for name in bits if name.endswith("conv_shortcut"))
    assert {name for name in bits if bits[name] == 4}, "the budget of 5.5 bits spared every layer"
    weights = {name: layer.inner.weight.numel() for name, layer in layers.items()}
    assert sum(bits[name] * weights[name] for name in bits) <= 5.5 * sum(weights.values())
