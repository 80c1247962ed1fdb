"""Which layers and steps suffer from quantization.

Two rankings, both by the relative squared error of the denoiser's output, ``sum |eps~ - eps|^2 / sum |eps|^2``:

    alone    the error while this layer alone is quantized (as MixDQ does, arXiv 2405.17873)
    relief   how much the error of the all-quantized network falls when this layer alone keeps full precision
             (QuEST's choice of critical layers, arXiv 2402.03666)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.placement import resting
from stepquant.calibration.samples import CalibrationSet
from stepquant.config import LayerBits
from stepquant.errors import StepquantError
from stepquant.models.description import main_tensor
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
    calibrated: CalibrationModel,
    blocks: Sequence[str],
    samples: CalibrationSet,
    how: How,
    *,
    batch_size: int,
    workspace: Workspace,
    stage: str,
    progress: Progress,
    step_groups: int = STEP_GROUPS,
) -> Sensitivity:
    """Measure the error that each layer of `calibrated` causes; layers measured are kept in the workspace.

    A layer is what an override of its name changes: its weight, its input, and for an attention's `to_q`, `to_k` and
    `to_v` the operand they make. The rest, such as attention probabilities, is off for ``alone`` and on for ``relief``.
    What lies before a layer's block is the same whether the layer is quantized or not, and does not run again. The
    workspace's processes share the layers.

    Args:
        calibrated: its ranges are found and its quantizers switched on; they are on again afterwards.
        blocks: in execution order; each layer is in one of them.
        batch_size: samples passed through at a time; the outputs of all blocks for them are in memory.
        stage: name in the workspace; stands for the network and the samples.
        step_groups: into how many groups the sampler's steps are divided; fewer if fewer steps have samples.
    """
    names = list(calibrated.layers)
    stage = f"{stage}-{how}-{step_groups}"
    measured = workspace.load(stage) or {}
    groups = _Groups(samples.steps, step_groups)
    batches = list(samples.batches(batch_size))
    network = _Network(calibrated, blocks, how)
    with progress.task(f"Ranking layers ({how})", len(batches) * len(names)) as advance:
        for index, rows in enumerate(batches):
            missing = [name for name in names if f"{index}.layer.{name}" not in measured]
            advance(len(names) - len(missing))
            if not missing:
                continue
            network.start(samples.arguments(rows))
            sums = partial(groups.sums, rows=rows)
            measured |= {f"{index}.power": sums(network.target), f"{index}.whole": sums(network.whole_error)}
            for name, error in zip(missing, workspace.ranks.map(network.error, missing), strict=True):
                measured[f"{index}.layer.{name}"] = sums(error)
                workspace.save(stage, measured)
                advance(1)
            network.switch(names, rest=True)

    def summed(what: str) -> Tensor:
        return torch.stack([measured[f"{index}.{what}"] for index in range(len(batches))]).sum(dim=0)

    power = summed("power").clamp(min=1e-12)
    whole = summed("whole") / power
    errors = torch.stack([summed(f"layer.{name}") / power for name in names])
    bits = {name: layer.bits for name, layer in calibrated.layers.items()}
    sizes = {name: layer.weight.numel() for name, layer in calibrated.layers.items()}
    return Sensitivity(how, bits, sizes, groups.ends, errors if how == "alone" else whole - errors, whole)


class _Groups:
    """The sampler's steps in groups: of each sample the one it is in, and of each group its first and last step."""

    def __init__(self, steps: Tensor, count: int) -> None:
        seen, position = steps.unique(return_inverse=True)
        self.count = min(count, len(seen))
        self.of_sample = position * self.count // len(seen)
        members = [steps[self.of_sample == group].tolist() for group in range(self.count)]
        self.ends = tuple((min(member), max(member)) for member in members)

    def sums(self, values: Tensor, rows: slice) -> Tensor:
        """Sum of squares over those of the samples `rows` that are in each group: float64 [G]."""
        squares = values.double().square().flatten(1).sum(dim=1)
        return torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.of_sample[rows], squares)


class _Network:
    """The denoiser with a switch for every layer, and for one batch what its blocks put out before any is turned.

    Attributes:
        target: the output of full precision for the batch.
        whole_error: what is added to it with everything quantized.
    """

    def __init__(self, calibrated: CalibrationModel, blocks: Sequence[str], how: How) -> None:
        self.calibrated, self.blocks, self.how = calibrated, list(blocks), how
        self.points = layer_points(calibrated)
        self.block_of = {name: block for block in blocks for name in calibrated.layers_in(block)}
        self.outputs: dict[str, Any] = {}

    def start(self, arguments: dict[str, Any]) -> None:
        """Take the batch with these arguments."""
        self.arguments, self.outputs = arguments, {}
        self.switch((), rest=False)
        with self._remembering() if self.how == "alone" else nullcontext():
            self.target = self._output()
        self.switch(list(self.calibrated.layers), rest=True)
        with self._remembering() if self.how == "relief" else nullcontext():
            self.whole_error = self._output() - self.target

    def error(self, layer: str) -> Tensor:
        """What is added to the target with this layer alone quantized, or with all others."""
        alone = self.how == "alone"
        self.switch([layer] if alone else set(self.calibrated.layers) - {layer}, rest=not alone)
        before = self.blocks[: self.blocks.index(self.block_of[layer])]
        modules = {name: self.calibrated.model.get_submodule(name) for name in before}

        def answer(name: str) -> Callable[..., Any]:
            return lambda *_args, **_kwargs: pytree.tree_map_only(Tensor, Tensor.clone, self.outputs[name])

        try:
            with resting(*modules.values()):
                for name, module in modules.items():
                    module.forward = answer(name)
                return self._output() - self.target
        finally:
            for module in modules.values():
                module.__dict__.pop("forward", None)

    def switch(self, layers: Collection[str], *, rest: bool) -> None:
        """Quantize exactly these layers, and with `rest` what belongs to no layer."""
        for point in self.calibrated.activation_points():
            point.bypassed = not rest
        for name, layer in self.calibrated.layers.items():
            layer.weight_point.bypassed = name not in layers
            for point in self.points[name]:
                point.bypassed = name not in layers

    @torch.no_grad()
    def _output(self) -> Tensor:
        return main_tensor(self.calibrated.model(**self.arguments, return_dict=False)).cpu()

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        """Keep what every block puts out."""

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                self.outputs[name] = pytree.tree_map_only(Tensor, Tensor.clone, output)

            return hook

        handles = [
            self.calibrated.model.get_submodule(block).register_forward_hook(keep(block)) for block in self.blocks
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def layer_points(calibrated: CalibrationModel) -> dict[str, list[ActivationPoint]]:
    """name -> the activation points that take that layer's bits: its input, and the attention operand it computes."""
    points = {
        name: [] if layer.input_point is None else [layer.input_point] for name, layer in calibrated.layers.items()
    }
    for name, attention in calibrated.attentions.items():
        for operand, point in attention.points.items():
            layer = f"{name}.{PROJECTIONS.get(operand)}"
            if layer in points and isinstance(point, ActivationPoint):
                points[layer].append(point)
    return points
