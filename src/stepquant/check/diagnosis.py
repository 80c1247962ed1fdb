"""Find out why a quantization is below the floor, and what brings it above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from stepquant.check.result import Check, Diagnosis, Mend
from stepquant.config import FLOAT_BITS, LayerBits
from stepquant.layers.install import Quantization
from stepquant.quality.blame import MEASUREMENTS, Trial, error_of, part_errors, step_errors
from stepquant.quality.held_out import HeldOut, HeldOutImages
from stepquant.quality.mixing import inside, mixed, overrides_of, with_dynamic_activations
from stepquant.recipes import Context
from stepquant.recipes.rounded import rounded
from stepquant.runtime import Backend

SEARCH_IMAGES, SEARCH_STEPS = 2, 10
"""Samples, and most steps of each, while the layers to blame are searched."""
PROMINENT = 0.1
"""Share of the largest error from which a part is named."""


class Finished(NamedTuple):
    """A quantized denoiser, and what it was made from."""

    context: Context
    quantization: Quantization
    denoiser: nn.Module
    record: dict[str, Any]


def diagnose(
    finished: Sequence[Finished], check: Check, held_out: HeldOut, backend: Backend, *, dynamic: bool
) -> Diagnosis:
    """Find the layers and steps to blame, and what brings the fidelity above the floor.

    Args:
        dynamic: whether dynamic activations may be what mends it.
    """
    small = held_out.shortened(SEARCH_IMAGES, SEARCH_STEPS) if isinstance(held_out, HeldOutImages) else held_out
    with finished[0].context.progress.task("Searching what causes the low quality", MEASUREMENTS) as advance:
        errors = {
            (each.context.component, part): error
            for each in finished
            for part, error in part_errors(_trial(each, small, backend), each.quantization, advance).items()
        }
        steps = _worst_steps(finished, small, held_out.steps)
        worst = max(errors, key=lambda key: errors[key])[0]
        mine = {part: error for (name, part), error in errors.items() if name == worst}
        each = next(each for each in finished if each.context.component == worst)
        search = MendSearch(
            each,
            _trial(each, held_out, backend),
            {other.context.component: other.denoiser for other in finished if other is not each},
            mine,
            sum(errors.values()) - sum(mine.values()),
            check.floor,
        )
        mend = (search.dynamic() if dynamic else None) or search.raised()
    prominent = [part for part, error in mine.items() if error >= PROMINENT * next(iter(mine.values()))]
    return Diagnosis(tuple(prominent), steps, mend)


def _trial(each: Finished, held_out: HeldOut, backend: Backend) -> Trial:
    context = each.context
    blocks = tuple(context.description.blocks)
    return Trial(held_out, context.component, context.denoiser, context.spec, backend, blocks, context.device)


def _worst_steps(finished: Sequence[Finished], held_out: HeldOut, steps: int) -> tuple[int, int] | None:
    """First and last of the steps with the largest error, of a check with `steps` steps."""
    if held_out.steps < 2 or not isinstance(held_out, HeldOutImages):
        return None
    originals = {each.context.component: each.context.denoiser for each in finished}
    errors = step_errors(held_out, originals, {each.context.component: each.denoiser for each in finished})
    first, last = max(errors, key=lambda group: errors[group])
    return first * steps // held_out.steps, (last + 1) * steps // held_out.steps - 1


@dataclass
class MendSearch:
    """Searches what holds the floor, by generating the check's samples.

    Attributes:
        trial: on the samples of the check.
        others: the other quantized denoisers of the pipeline.
        errors: part -> error that it causes alone, largest first.
        rest: error that the others cause.
    """

    each: Finished
    trial: Trial
    others: Mapping[str, nn.Module]
    errors: Mapping[str, float]
    rest: float
    floor: float

    def _found(self, overrides: dict[str, str], quantization: Quantization) -> Mend | None:
        decibels = self.trial.decibels(quantization, self.others)
        if decibels < self.floor:
            return None
        return Mend(self.each.context.component, overrides, decibels, quantization)

    def dynamic(self) -> Mend | None:
        """Dynamic activations in place of static ones."""
        spec = self.each.context.spec
        if spec.activations == "dynamic" or spec.default_bits.activation == FLOAT_BITS:
            return None
        return self._found({}, with_dynamic_activations(self.each.quantization))

    def raised(self) -> Mend | None:
        """The fewest parts of largest error, at the fewest higher bits."""
        errors = list(self.errors.values())
        allowed = error_of(self.floor) - self.rest
        count = next((count for count in range(1, len(errors)) if sum(errors[count:]) <= allowed), len(errors))
        made: dict[str, Quantization | None] = {}
        failed = 0
        while True:
            for bits in higher_bits(self.each.context.spec.default_bits):
                if bits not in made:
                    made[bits] = None if LayerBits.parse(bits).is_float else rounded(self.each.context, bits)
                found = self._with(count, bits, made[bits])
                if found is not None:
                    return self._fewer(failed, count, bits, made[bits]) or found
            if count == len(errors):
                return None
            failed, count = count, min(2 * count, len(errors))

    def _with(self, count: int, bits: str, higher: Quantization | None) -> Mend | None:
        """The first parts at other bits, if that holds the floor."""
        base, parts = self.each.quantization, list(self.errors)[:count]
        quantization = mixed(base, higher, inside(parts), self.trial.model)
        return self._found(overrides_of(parts, base.layers, bits), quantization)

    def _fewer(self, failed: int, count: int, bits: str, higher: Quantization | None) -> Mend | None:
        """Fewer parts than `count`, and more than `failed`, that hold the floor, by bisection."""
        best = None
        while count - failed > 1:
            middle = (failed + count) // 2
            found = self._with(middle, bits, higher)
            best, failed, count = (best, middle, count) if found is None else (found, failed, middle)
        return best


def higher_bits(bits: LayerBits) -> list[str]:
    """Bits above these, in ascending order of precision."""
    both = [LayerBits(8, max(8, bits.activation)), LayerBits(8, FLOAT_BITS), LayerBits(FLOAT_BITS, FLOAT_BITS)]
    return [str(each) for each in dict.fromkeys(both) if each.weight + each.activation > bits.weight + bits.activation]
