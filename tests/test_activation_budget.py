"""Activation bits by step, chosen within a budget."""

from __future__ import annotations

import itertools

import pytest
import torch

import stepquant as sq
from stepquant.config import Steps
from stepquant.errors import StepquantError
from stepquant.layers.quantized import quantized_modules
from stepquant.pipelines.request import make_request
from stepquant.progress import Progress
from stepquant.provenance import command
from stepquant.quality.precision import Trajectories, choose, measure_effects, split_into_parts, step_rules
from stepquant.saving import provenance_of

SMALL = sq.Calibration(samples=8, steps=4)
INTERVALS = (0, 2, 4, 6)
LAYERS = {"a.0.x": 10, "a.0.y": 10, "b.0": 20, "b.1": 20}
PARTS = split_into_parts(LAYERS, 80, 2)


class Additive:
    """Each layer adds an error in each step in which it has the lower bits; layer b.1 in step 5 adds nearly all."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.errors = {(layer, step): float(torch.rand(())) * 1e-3 for layer in LAYERS for step in range(6)}
        self.errors["b.1", 5] = 1.0

    def set(self, raised) -> None:
        self.raised = {(layer, step) for layer, steps in raised.items() for step in steps}

    def error(self, _model, _recorded=None, *, until=0) -> float:
        return sum(error for unit, error in self.errors.items() if unit not in self.raised)


def test_effects_of_a_denoiser_whose_errors_add_up():
    model = Additive()
    effects = measure_effects(model, None, model, PARTS, INTERVALS)
    for row, index in itertools.product(range(2), range(3)):
        inside = range(INTERVALS[index], INTERVALS[index + 1])
        expected = sum(model.errors[layer, step] for layer in PARTS[row].layers for step in inside)
        assert float(effects.gains[row, index]) == pytest.approx(expected)
        assert float(effects.losses[row, index]) == pytest.approx(expected)
    costs = torch.full((2, 3), 0.5, dtype=torch.float64)
    for values in effects.rankings():
        assert choose(values, costs, 0.5) == {(1, 2)}


def test_parts_cover_all_layers_once():
    assert [part.layers for part in PARTS] == [("a.0.x", "a.0.y"), ("b.0", "b.1")]
    assert [part.share for part in PARTS] == [0.25, 0.5]


@pytest.mark.parametrize("spare", [0.0, 0.3, 0.5, 1.1, 10.0])
def test_greedy_takes_the_best_that_fits(spare):
    """With costs of one size it is optimal, against all subsets."""
    torch.manual_seed(1)
    values, costs = torch.rand(2, 3, dtype=torch.float64), torch.full((2, 3), 0.25, dtype=torch.float64)
    units = list(itertools.product(range(2), range(3)))
    subsets = (
        set(some) for count in range(7) for some in itertools.combinations(units, count) if count * 0.25 <= spare
    )
    best = max(subsets, key=lambda subset: sum(float(values[unit]) for unit in subset))
    assert choose(values, costs, spare) == best


def test_worthless_bits_are_not_spent():
    assert choose(torch.tensor([[0.0, -1.0]]), torch.tensor([[0.1, 0.1]]), 5.0) == set()


@pytest.mark.parametrize(
    "units", [set(), {(0, 0), (1, 0), (0, 1)}, {(1, 2)}, set(itertools.product(range(2), range(3)))]
)
def test_rules_name_exactly_these_units(units):
    rules = [Steps.parse(text) for text in step_rules(units, PARTS, INTERVALS, 8)]
    for (row, part), index in itertools.product(enumerate(PARTS), range(3)):
        times = [(step + 0.5) / 6 for step in range(INTERVALS[index], INTERVALS[index + 1])]
        for layer, time in itertools.product(part.layers, times):
            assert any(rule.include(layer, time) for rule in rules) == ((row, index) in units)


def test_steps_before_a_unit_are_not_computed_again(class_pipeline):
    """And the images are those of the whole trajectory."""
    trajectories = Trajectories(class_pipeline, "transformer", make_request(class_pipeline, 4), range(2), 7)
    model, calls = class_pipeline.transformer, []
    handle = model.pos_embed.register_forward_hook(lambda *_: calls.append(1))
    outputs = []
    assert trajectories.error(model, outputs) == 0
    once = len(calls)
    assert trajectories.error(model, outputs, until=3) == 0
    handle.remove()
    assert len(calls) == once + once // 4


class Notes(Progress):
    def __init__(self) -> None:
        self.notes = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_budget_holds_and_is_recorded(activations, class_pipeline):
    notes, spec = Notes(), sq.QuantSpec(bits="w4a4", activations=activations)

    def quantize(**options):
        return sq.quantize(
            class_pipeline, spec, recipe="minmax", activation_budget=6, calibration=SMALL, check=False, **options
        )

    found = quantize(progress=notes)
    assert any("activation bits over 4 steps" in note for note in notes.notes)
    recorded = provenance_of(found.transformer)
    assert recorded["activation_budget"] == 6 and recorded["spec"]["step_bits"]
    assert "--activation-budget 6" in command(recorded | {"inputs": {}})
    grids = {name: module.layer().input for name, module in quantized_modules(found.transformer).items()}
    mixed = [name for name, grid in grids.items() if grid is not None and grid.row_bits is not None]
    assert mixed and {bits for name in mixed for bits in grids[name].row_bits.tolist()} == {4, 8}
    assert provenance_of(quantize().transformer)["spec"] == recorded["spec"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"activation_budget": 3}, "budget of 3 bits cannot be met; expected 4"),
        ({"activation_budget": 5, "spec": sq.QuantSpec(bits="w4a4", step_bits={"0-1": 8})}, "Leave one out"),
        ({"activation_budget": 5, "spec": "w4a16"}, "no layer has the activation bits"),
    ],
)
def test_budgets_that_cannot_be_met(options, message, class_pipeline):
    with pytest.raises(StepquantError, match=message):
        sq.quantize(class_pipeline, **{"spec": "w4a4", **options}, recipe="minmax", calibration=SMALL, check=False)
