"""Find the layers and the steps that most of a quantization's error at the final image comes from.

Errors of single layers do not tell: a long skip carries the noise of a whole stage past everything that follows. So
each part of the denoiser is quantized alone, images are generated, and their error is what the part causes. The
part of largest error is then divided, ``down_blocks.0`` into ``down_blocks.0.resnets.0`` and so on, down to layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import nn

from stepquant.assembly import quantized_copy
from stepquant.calibration.placement import placed, staying
from stepquant.config import QuantSpec
from stepquant.distributed import Ranks
from stepquant.layers.clock import TimestepReader
from stepquant.layers.install import Quantization
from stepquant.pipelines.overflow import NotFiniteError
from stepquant.pipelines.steps import StepCounter
from stepquant.quality.held_out import LOWEST, HeldOut
from stepquant.quality.mixing import inside, mixed, parts_of
from stepquant.runtime import Backend

MEASUREMENTS = 40
"""Parts that are measured before the search for layers ends."""
NEGLIGIBLE = 0.1
"""Share of the error up to which a part is not divided."""
STEP_GROUPS = 4


@dataclass(frozen=True)
class Trial:
    """Generates the held-out samples with any quantization of one denoiser.

    Attributes:
        component: name of the denoiser in its pipeline.
        model: in full precision.
        blocks, device: of the denoiser that compute on another device, see `stepquant.calibration.placement`.
    """

    held_out: HeldOut
    component: str
    model: nn.Module
    spec: QuantSpec
    backend: Backend = "auto"
    blocks: tuple[str, ...] = ()
    device: torch.device | None = None

    def denoiser(self, quantization: Quantization) -> Any:
        """A copy of the denoiser that carries `quantization`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that layers of a trial run in the slow reference
            return quantized_copy(self.model, quantization, self.spec, {}, self.backend)

    def decibels(self, quantization: Quantization, others: Mapping[str, nn.Module] | None = None) -> float:
        """Mean fidelity with this quantization; other denoisers stay in full precision unless given."""
        denoiser = self.denoiser(quantization)
        with on_device(denoiser, self.blocks, self.device):
            return fmean(sample_decibels(self.held_out, {**(others or {}), self.component: denoiser}))

    def with_only(self, quantization: Quantization, part: str) -> float:
        """Mean fidelity with one part of the denoiser quantized."""
        rest = mixed(quantization, None, lambda name: not inside([part])(name), self.model)
        return self.decibels(replace(rest, parameters={}))


@contextmanager
def on_device(denoiser: nn.Module, blocks: Iterable[str], device: torch.device | None) -> Iterator[None]:
    """Compute the blocks of a quantized denoiser on a device, where they stay for the duration of the context."""
    blocks = list(blocks)
    with placed(denoiser, blocks, device), staying(*map(denoiser.get_submodule, blocks)):
        yield


def sample_decibels(held_out: HeldOut, quantized: Mapping[str, nn.Module]) -> list[float]:
    """Fidelity of each sample, dB; `LOWEST` of all if a denoiser outputs NaN or infinity.

    Every process measures, and takes the figures of the main one.
    """
    try:
        found = held_out.decibels(quantized).tolist()
    except NotFiniteError:
        found = [LOWEST] * held_out.count
    return list(Ranks.current().broadcast(found))


def error_of(decibels: float) -> float:
    """Mean squared error, relative to the peak or the signal."""
    return float(10 ** (-decibels / 10))


def part_errors(
    trial: Trial, quantization: Quantization, advance: Callable[[int], None], measurements: int = MEASUREMENTS
) -> dict[str, float]:
    """Parts of the denoiser that together are all of it, and the error that each causes alone; largest first.

    Args:
        advance: is told of each measurement.
        measurements: maximum number of them, beyond which only the first division goes.
    """
    errors: dict[str, float] = {}
    members = {"": list(quantization.layers)}
    left = measurements
    while members:
        largest = max(members, key=lambda part: errors.get(part, float("inf")))
        children = parts_of(members.pop(largest))
        negligible = errors.get(largest, float("inf")) < NEGLIGIBLE * sum(errors.values())
        if errors and (negligible or len(children) > left):
            break
        errors.pop(largest, None)
        for part, names in children.items():
            errors[part] = error_of(trial.with_only(quantization, part))
            left -= 1
            advance(1)
            if len(names) > 1:
                members[part] = names
    return dict(sorted(errors.items(), key=lambda item: item[1], reverse=True))


def step_errors(
    held_out: HeldOut, originals: Mapping[str, nn.Module], quantized: Mapping[str, nn.Module]
) -> dict[tuple[int, int], float]:
    """First and last step of each group of steps -> the error if only these are taken with quantized denoisers."""
    count = min(STEP_GROUPS, held_out.steps)
    bounds = [index * held_out.steps // count for index in range(count + 1)]
    errors = {}
    for first, end in pairwise(bounds):
        with _only_at(range(first, end), originals, quantized):
            errors[first, end - 1] = error_of(fmean(sample_decibels(held_out, quantized)))
    return errors


@contextmanager
def _only_at(steps: range, originals: Mapping[str, nn.Module], quantized: Mapping[str, nn.Module]) -> Iterator[None]:
    """Answer the quantized denoisers' calls at other steps in full precision."""
    counter = StepCounter()  # of all denoisers together
    handles = []
    for name, model in quantized.items():
        timestep_of, original = TimestepReader.of(model), originals[name]

        def answer(
            _model: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: Any,
            original: nn.Module = original,
            timestep_of: TimestepReader = timestep_of,
        ) -> Any:
            counter.see(timestep_of(args, kwargs))
            return output if counter.step in steps else original(*args, **kwargs)

        handles.append(model.register_forward_hook(answer, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
