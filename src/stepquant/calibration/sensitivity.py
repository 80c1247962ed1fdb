"""Which layers and steps suffer from quantization.

Two rankings, both by the relative squared error of the denoiser's output, ``sum |eps~ - eps|^2 / sum |eps|^2``:

    alone    the error while this layer alone is quantized (as MixDQ does, arXiv 2405.17873)
    relief   how much the error of the all-quantized network falls when this layer alone keeps full precision
             (QuEST's choice of critical layers, arXiv 2402.03666)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from stepquant.calibration.instrument import Instrumented
from stepquant.calibration.trajectories import CalibrationSet
from stepquant.config import LayerBits
from stepquant.errors import StepquantError
from stepquant.models.description import main_tensor
from stepquant.nn.activation_quantizer import ActivationQuantizer
from stepquant.progress import Progress
from stepquant.workspace import Workspace

How = Literal["alone", "relief"]

STEP_GROUPS = 10
"""Groups that the sampler's steps are divided into, unless there are fewer steps."""

PROJECTIONS = {"query": "to_q", "key": "to_k", "value": "to_v"}
"""Operand of an attention -> the layer that makes it, whose bits it takes."""


@dataclass(frozen=True)
class Sensitivity:
    """The error that each layer causes at each group of steps.

    Attributes:
        how: which ranking.
        bits: name -> bits of every quantized layer, in execution order; L of them.
        sizes: name -> number of weights.
        steps: first and last sampler step of each group, from 0 (pure noise) on; G groups.
        errors: float64 [L, G], relative squared error of the denoiser's output; by relief it may be negative.
        whole: float64 [G], that of the network with every layer and attention quantized.
    """

    how: How
    bits: dict[str, LayerBits]
    sizes: dict[str, int]
    steps: tuple[tuple[int, int], ...]
    errors: Tensor
    whole: Tensor

    @property
    def mean(self) -> dict[str, float]:
        """name -> error over all groups of steps, each weighing alike."""
        return dict(zip(self.bits, self.errors.mean(dim=1).tolist(), strict=True))

    def ranking(self) -> list[str]:
        """Names of the layers, most sensitive first."""
        mean = self.mean
        return sorted(mean, key=lambda name: mean[name], reverse=True)


def check_how(how: str) -> How:
    """`how` itself; raises `StepquantError` unless it is a ranking there is."""
    for known in get_args(How):
        if how == known:
            return known
    raise StepquantError(f"how is {how!r}: expected one of {', '.join(get_args(How))}.")


def measure(
    instrumented: Instrumented,
    samples: CalibrationSet,
    how: How,
    *,
    batch_size: int,
    workspace: Workspace,
    stage: str,
    progress: Progress,
    step_groups: int = STEP_GROUPS,
) -> Sensitivity:
    """Measure the error that each layer of `instrumented` causes; layers measured are kept in the workspace.

    A layer is what an exception of its name changes: its weight, its input, and for an attention's `to_q`, `to_k` and
    `to_v` the operand they make. The rest, such as attention probabilities, is off for ``alone`` and on for ``relief``.
    The workspace's processes share the layers.

    Args:
        instrumented: its ranges are found and its quantizers switched on; they are on again afterwards.
        stage: name in the workspace; stands for the network and the samples.
        step_groups: into how many groups the sampler's steps are divided; fewer if fewer steps have samples.
    """
    names = list(instrumented.layers)
    stage = f"{stage}-{how}-{step_groups}"
    measured = workspace.load(stage) or {}
    missing = [name for name in names if f"layer.{name}" not in measured]
    if missing:
        network = _Network(instrumented, samples, batch_size, step_groups)
        measured |= {"steps": network.group_ends(), "whole": network.error(names, rest=True)}
        with progress.task(f"Ranking layers ({how})", len(names)) as advance:
            advance(len(names) - len(missing))

            def error_of(name: str) -> Tensor:
                if how == "alone":
                    return network.error([name], rest=False)
                return measured["whole"] - network.error(set(names) - {name}, rest=True)

            for name, error in zip(missing, workspace.ranks.deal(error_of, missing), strict=True):
                measured[f"layer.{name}"] = error
                workspace.save(stage, measured)
                advance(1)
        network.switch(names, rest=True)
    ends = tuple((first, last) for first, last in measured["steps"].tolist())
    errors = torch.stack([measured[f"layer.{name}"] for name in names])
    bits = {name: layer.bits for name, layer in instrumented.layers.items()}
    sizes = {name: layer.weight.numel() for name, layer in instrumented.layers.items()}
    return Sensitivity(how, bits, sizes, ends, errors, measured["whole"])


class _Network:
    """The denoiser with a switch for every layer, and what it puts out in full precision on the samples."""

    def __init__(self, instrumented: Instrumented, samples: CalibrationSet, batch_size: int, step_groups: int) -> None:
        self.instrumented, self.samples, self.batch_size = instrumented, samples, batch_size
        self.quantizers = layer_quantizers(instrumented)
        seen, position = samples.steps.unique(return_inverse=True)
        self.groups = min(step_groups, len(seen))
        self.group = position * self.groups // len(seen)
        self.target = self._output((), rest=False)
        self.power = self._by_group(self.target).clamp(min=1e-12)

    def group_ends(self) -> Tensor:
        """First and last sampler step of each group: int64 [G, 2]."""
        groups = [self.samples.steps[self.group == group] for group in range(self.groups)]
        return torch.stack([torch.stack([steps.min(), steps.max()]) for steps in groups])

    def error(self, layers: Collection[str], *, rest: bool) -> Tensor:
        """Relative squared error of the output with exactly these layers quantized: float64 [G]."""
        return self._by_group(self._output(layers, rest=rest) - self.target) / self.power

    def switch(self, layers: Collection[str], *, rest: bool) -> None:
        """Quantize exactly these layers, and with `rest` what belongs to no layer."""
        for quantizer in self.instrumented.activation_quantizers():
            quantizer.enabled = rest
        for name, layer in self.instrumented.layers.items():
            layer.quantizing_weight = name in layers
            for quantizer in self.quantizers[name]:
                quantizer.enabled = name in layers

    @torch.no_grad()
    def _output(self, layers: Collection[str], *, rest: bool) -> Tensor:
        """The denoiser's output on all samples with exactly these layers quantized: float32 [N, ...]."""
        self.switch(layers, rest=rest)
        model, batches = self.instrumented.model, self.samples.batches(self.batch_size)
        answers = (model(**self.samples.arguments(rows), return_dict=False) for rows in batches)
        return torch.cat([main_tensor(answer).cpu() for answer in answers])

    def _by_group(self, values: Tensor) -> Tensor:
        """Sum of squares over the samples of each group: float64 [G]."""
        squares = values.double().square().flatten(1).sum(dim=1)
        return torch.zeros(self.groups, dtype=torch.float64).index_add_(0, self.group, squares)


def layer_quantizers(instrumented: Instrumented) -> dict[str, list[ActivationQuantizer]]:
    """name -> the activation quantizers that take that layer's bits: its input's, and the operand it makes."""
    quantizers = {
        name: [] if layer.activation_quantizer is None else [layer.activation_quantizer]
        for name, layer in instrumented.layers.items()
    }
    for name, attention in instrumented.attentions.items():
        for operand, quantizer in attention.quantizers.items():
            layer = f"{name}.{PROJECTIONS.get(operand)}"
            if layer in quantizers and isinstance(quantizer, ActivationQuantizer):
                quantizers[layer].append(quantizer)
    return quantizers
