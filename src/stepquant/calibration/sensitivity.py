"""Rank layers and denoising steps by the error that quantizing them causes.

Two methods, both by the relative squared error of the denoiser's output, ``sum |eps~ - eps|^2 / sum |eps|^2``:

    one-at-a-time    the error while one layer is quantized (as in MixDQ, arXiv 2405.17873)
    leave-one-out    the decrease of the fully quantized network's error when one layer keeps full precision
                     (how QuEST, arXiv 2402.03666, selects critical layers)
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

from stepquant.calibration.fake_quant.layers import Point
from stepquant.calibration.model import CalibrationModel, projection_of
from stepquant.calibration.placement import answering
from stepquant.calibration.samples import CalibrationSet
from stepquant.config import LayerBits
from stepquant.errors import StepquantError
from stepquant.models.description import main_tensor
from stepquant.progress import Progress
from stepquant.workspace import Workspace

Method = Literal["one-at-a-time", "leave-one-out"]

STEP_GROUPS = 10
"""Groups that the sampler's steps are divided into, unless there are fewer steps."""


@dataclass(frozen=True)
class Sensitivity:
    """The error that each layer causes in each group of steps.

    Attributes:
        method: how it was measured.
        bits: name -> bits of every quantized layer, in execution order; L layers.
        sizes: name -> number of weights.
        steps: first and last sampler step of each group, from 0 (pure noise) on; G groups.
        errors: float64 [L, G], relative squared error of the denoiser's output; negative values are possible with
            leave-one-out.
        whole: float64 [G], the error with every layer and attention quantized.
    """

    method: Method
    bits: dict[str, LayerBits]
    sizes: dict[str, int]
    steps: tuple[tuple[int, int], ...]
    errors: Tensor
    whole: Tensor

    @property
    def mean(self) -> dict[str, float]:
        """name -> mean error over the groups of steps."""
        return dict(zip(self.bits, self.errors.mean(dim=1).tolist(), strict=True))

    def ranking(self) -> list[str]:
        """Names of the layers, most sensitive first."""
        mean = self.mean
        return sorted(mean, key=lambda name: mean[name], reverse=True)


def check_method(method: str) -> Method:
    """Return `method`; raise `StepquantError` for an unknown one."""
    for known in get_args(Method):
        if method == known:
            return known
    raise StepquantError(f"method {method!r} does not exist; expected one of {', '.join(get_args(Method))}.")


def measure(
    calibrated: CalibrationModel,
    blocks: Sequence[str],
    samples: CalibrationSet,
    method: Method,
    *,
    batch_size: int,
    workspace: Workspace,
    stage: str,
    progress: Progress,
    step_groups: int = STEP_GROUPS,
) -> Sensitivity:
    """Measure the error that each layer of `calibrated` causes; finished layers are stored in the workspace.

    A layer stands for what an override of its name changes: its weight, its input, and the attention operand that a
    `to_q`, `to_k` or `to_v` computes. The rest, such as attention probabilities, is quantized for ``leave-one-out``
    only. The blocks before a layer's block are not run again. The workspace's processes share the layers.

    Args:
        calibrated: its activations have grids; everything is quantized again afterwards.
        blocks: in execution order; each layer is in one of them.
        batch_size: samples per pass; the outputs of all blocks for one batch are held in memory.
        stage: name in the workspace; stands for the network and the samples.
        step_groups: groups that the sampler's steps are divided into; fewer if fewer steps have samples.
    """
    names = list(calibrated.layers)
    stage = f"{stage}-{method}-{step_groups}"
    measured = workspace.load(stage) or {}
    groups = _Groups(samples.steps, step_groups)
    batches = list(samples.batches(batch_size))
    network = _Network(calibrated, blocks, method)
    with progress.task(f"Ranking layers ({method})", len(batches) * len(names)) as advance:
        for index, rows in enumerate(batches):
            done = measured.get(f"{index}.layers", torch.zeros(0, groups.count, dtype=torch.float64))
            missing = names[len(done) :]
            advance(len(done))
            if not missing:
                continue
            network.start(samples.arguments(rows))
            sums = partial(groups.sums, rows=rows)
            measured |= {f"{index}.power": sums(network.target), f"{index}.whole": sums(network.whole_error)}
            for error in workspace.ranks.map(network.error, missing):
                measured[f"{index}.layers"] = done = torch.cat([done, sums(error)[None]])
                workspace.save(stage, measured)
                advance(1)
            network.quantize(names, rest=True)

    def summed(what: str) -> Tensor:
        return torch.stack([measured[f"{index}.{what}"] for index in range(len(batches))]).sum(dim=0)

    power = summed("power").clamp(min=1e-12)
    whole = summed("whole") / power
    errors = summed("layers") / power
    bits = {name: layer.bits for name, layer in calibrated.layers.items()}
    sizes = {name: layer.weight.numel() for name, layer in calibrated.layers.items()}
    errors = errors if method == "one-at-a-time" else whole - errors
    return Sensitivity(method, bits, sizes, groups.ends, errors, whole)


class _Groups:
    """The sampler's steps in groups.

    Attributes:
        of_sample: int64 [N], the group of each sample.
        ends: first and last step of each group.
    """

    def __init__(self, steps: Tensor, count: int) -> None:
        seen, position = steps.unique(return_inverse=True)
        self.count = min(count, len(seen))
        self.of_sample = position * self.count // len(seen)
        members = [steps[self.of_sample == group].tolist() for group in range(self.count)]
        self.ends = tuple((min(member), max(member)) for member in members)

    def sums(self, values: Tensor, rows: slice) -> Tensor:
        """Sum of squares over the samples `rows` of each group: float64 [G]."""
        squares = values.double().square().flatten(1).sum(dim=1)
        return torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.of_sample[rows], squares)


class _Network:
    """The denoiser with any subset of its layers quantized, on one batch.

    Attributes:
        target: output in full precision.
        whole_error: difference from it with everything quantized.
        outputs: of every block, before any layer is switched: in full precision for one-at-a-time, else quantized.
    """

    def __init__(self, calibrated: CalibrationModel, blocks: Sequence[str], method: Method) -> None:
        self.calibrated, self.blocks, self.one_at_a_time = calibrated, list(blocks), method == "one-at-a-time"
        self.points = layer_points(calibrated)
        self.block_of = {name: block for block in blocks for name in calibrated.layers_in(block)}
        self.outputs: dict[str, Any] = {}

    def start(self, arguments: dict[str, Any]) -> None:
        """Begin the batch with these arguments."""
        self.arguments, self.outputs = arguments, {}
        self.quantize((), rest=False)
        with self._recording() if self.one_at_a_time else nullcontext():
            self.target = self._output()
        self.quantize(list(self.calibrated.layers), rest=True)
        with nullcontext() if self.one_at_a_time else self._recording():
            self.whole_error = self._output() - self.target

    def error(self, layer: str) -> Tensor:
        """Difference from the target with only this layer quantized, or with all others."""
        layers = {layer} if self.one_at_a_time else set(self.calibrated.layers) - {layer}
        self.quantize(layers, rest=not self.one_at_a_time)
        before = self.blocks[: self.blocks.index(self.block_of[layer])]

        def answer(name: str) -> Callable[..., Any]:
            return lambda *_args, **_kwargs: pytree.tree_map_only(Tensor, Tensor.clone, self.outputs[name])

        with answering({self.calibrated.model.get_submodule(name): answer(name) for name in before}):
            return self._output() - self.target

    def quantize(self, layers: Collection[str], *, rest: bool) -> None:
        """Quantize exactly these layers and, with `rest`, the activations that belong to no layer."""
        for point in self.calibrated.points():
            point.bypassed = not rest
        for name, layer in self.calibrated.layers.items():
            layer.weight_point.bypassed = name not in layers
            for point in self.points[name]:
                point.bypassed = name not in layers

    @torch.no_grad()
    def _output(self) -> Tensor:
        return main_tensor(self.calibrated.model(**self.arguments)).cpu()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Record the outputs of every block."""

        def record(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                self.outputs[name] = pytree.tree_map_only(Tensor, Tensor.clone, output)

            return hook

        model = self.calibrated.model
        handles = [model.get_submodule(block).register_forward_hook(record(block)) for block in self.blocks]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def layer_points(calibrated: CalibrationModel) -> dict[str, list[Point]]:
    """name -> the activation points that take that layer's bits: its input, and the attention operand it computes."""
    points = {
        name: [] if layer.input_point is None else [layer.input_point] for name, layer in calibrated.layers.items()
    }
    for name, attention in calibrated.attentions.items():
        for operand, point in attention.points.items():
            layer = projection_of(calibrated.model, name, operand)
            if layer in points and isinstance(point, Point):
                points[layer].append(point)
    return points
