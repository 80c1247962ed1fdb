"""The model under calibration: a copy of the denoiser whose layers and attentions are quantized in simulation."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.activation_quantizers import Start
from stepquant.calibration.fake_quant.dynamic import DynamicPoint
from stepquant.calibration.fake_quant.layers import CalibratedAttention, CalibratedLayer, Point, dynamic_grid, wrap
from stepquant.calibration.fake_quant.observer import ActivationRange
from stepquant.calibration.fake_quant.weight_quantizers import RoundToNearest
from stepquant.calibration.samples import CalibrationSet
from stepquant.config import FLOAT_BITS, QuantSpec, Steps
from stepquant.core.ranges import Range
from stepquant.core.row_bits import InvalidGrid, column
from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.layers.clock import StepClock
from stepquant.layers.format import OPERANDS
from stepquant.layers.install import Quantization
from stepquant.layers.interception import install_attention
from stepquant.layers.quantized import can_quantize, replace_module
from stepquant.models import ModelDescription
from stepquant.progress import Progress

PROJECTIONS = {
    operand: (f"to_{operand[0]}", f"{operand[0]}_proj", "to_qkv", "qkv") for operand in ("query", "key", "value")
}
"""Operand of an attention -> names of the layers that may compute it."""


@dataclass(frozen=True)
class CalibrationModel:
    """A copy of a denoiser under calibration.

    Attributes:
        model: the copy; runs like the original. At first weights are rounded to nearest and activations pass through.
        clock: attached to `model`.
        layers: name -> layer under calibration; names are those of the original model.
        attentions: name (see `stepquant.layers.interception`) -> attention under calibration.
        time_layers: names of the linears whose input depends on the timestep alone, quantized or not.
        timestep: name of the timestep among the parameters of the denoiser's forward.
        trained: names of the parameters outside `layers` that were trained, and are stored with them.
    """

    model: nn.Module
    clock: StepClock
    layers: dict[str, CalibratedLayer]
    attentions: dict[str, CalibratedAttention]
    time_layers: tuple[str, ...] = ()
    timestep: str = "timestep"
    trained: list[str] = field(default_factory=list)

    def activation_points(self, block: str | None = None) -> Iterator[ActivationPoint]:
        """All activation points with a grid to calibrate, or those inside one block."""
        root = self.model if block is None else self.model.get_submodule(block)
        return (module for module in root.modules() if isinstance(module, ActivationPoint))

    def use_signed_grids(self, behind_silu: Container[str]) -> None:
        """Quantize activations to TDQ's grids, see `ActivationLayout.kind`; attention probabilities stay unsigned.

        Args:
            behind_silu: names of the layers whose input is SiLU's output.
        """
        shifted = {id(layer.input_point) for name, layer in self.layers.items() if name in behind_silu}
        for point in self.activation_points():
            if not point.layout.unsigned:
                point.layout = replace(point.layout, kind="silu" if id(point) in shifted else "signed")

    def points(self) -> Iterator[Point]:
        """All points where an activation is quantized."""
        return (module for module in self.model.modules() if isinstance(module, Point))

    def layers_in(self, block: str) -> dict[str, CalibratedLayer]:
        """The layers inside one block, which may itself be a layer."""
        return {name: layer for name, layer in self.layers.items() if name == block or name.startswith(f"{block}.")}

    def state(self) -> dict[str, Tensor]:
        """All codes, grids and biases reached so far, by name: what later stages start from."""
        state: dict[str, Tensor] = {"timesteps": self.clock.timesteps}
        for name, layer in self.layers.items():
            state[f"{name}.codes"] = layer.weight_point.codes(layer.weight)
            state[f"{name}.scale"] = layer.weight_point.scale
            if layer.inner.bias is not None:
                state[f"{name}.bias"] = layer.inner.bias
        for index, point in enumerate(self.activation_points()):
            if point.calibrated:
                state[f"{index}.scale"], state[f"{index}.zero_point"] = point.scale, point.zero_point
        return state

    def to_quantized(self) -> Quantization:
        """Integers and grids as they are stored; raises `StepquantError` where they break an invariant."""
        return Quantization(
            self.clock.timesteps,
            {name: _quantized(name, layer) for name, layer in self.layers.items()},
            {name: _quantized(name, attention) for name, attention in self.attentions.items() if attention.points},
            self.time_layers,
            parameters={name: self.model.get_parameter(name).detach().cpu().clone() for name in self.trained},
            timestep=self.timestep,
        )


def _quantized(name: str, part: Any) -> Any:
    """A layer or attention under calibration -> its integers and grids, checked."""
    try:
        quantized = part.to_quantized()
        quantized.check()
    except InvalidGrid as error:
        raise StepquantError(
            f"layer {name} cannot be stored: {error.what}. Correct the recipe or custom quantizer."
        ) from None
    return quantized


def check_overrides(description: ModelDescription, spec: QuantSpec) -> None:
    """Raise `StepquantError` if an override, or step bits, of the spec match no layer."""
    patterns = [("override", pattern) for pattern in spec.overrides]
    patterns += [("step bits for", steps.layers) for each in spec.step_bits if (steps := Steps.parse(each)).layers]
    for what, pattern in patterns:
        if not any(re.search(pattern, name) for name in description.layers):
            raise StepquantError(f"{what} {pattern!r} matches none of the layers: `stepquant inspect` lists them.")


def insert_fake_quantizers(
    denoiser: nn.Module,
    description: ModelDescription,
    spec: QuantSpec,
    *,
    timesteps: Tensor | None = None,
    times: Sequence[float] = (),
    tabled: Container[str] | None = None,
    weight_range: Range = "least-error",
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    rounding: type[RoundToNearest] = RoundToNearest,
) -> CalibrationModel:
    """Copy `denoiser` and put its layers and attentions under calibration.

    Args:
        timesteps: float [R]: makes every activation table per-step, one row for each; None means static scales.
        times: normalized time of each of `timesteps`, if the spec has `step_bits`; then every activation has a table.
        tabled: names of the layers whose inputs have such a table, all others being static; None means all.
        weight_range: method of the weights' range search, or a function, see `find_range`.
        ranks: share the search.
        rounding: rounds weights that are not learned, see `WeightPoint`.

    Raises:
        StepquantError: if an override of the spec matches no layer.
    """
    check_overrides(description, spec)
    # Weights are never changed, only read through their quantizers: the copy shares their memory.
    weights: list[Any] = [module.weight for module in denoiser.modules() if can_quantize(module)]
    shared: dict[int, Any] = {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in weights}
    model = copy.deepcopy(denoiser, shared).requires_grad_(False).eval()
    clock = StepClock(timesteps)
    rows = len(clock.timesteps)
    layers: dict[str, CalibratedLayer] = {}
    ranks = ranks or Ranks()
    quantized = description.quantized_bits(spec)
    if times:
        tabled = None
    with (progress or Progress()).task("Searching weight ranges", len(quantized)) as advance:
        for name, bits in quantized.items():
            advance(1)
            activation, row_bits = _over_time(
                bits.activation, description.activation_bits(spec, name, bits.activation, times)
            )
            layers[name] = wrap(
                model.get_submodule(name),
                bits.weight,
                None if activation == FLOAT_BITS else activation,
                clock,
                split=description.skip_splits.get(name) if spec.split_skips else None,
                group_size=spec.group_size,
                rows=rows if tabled is None or name in tabled else 1,
                row_bits=row_bits,
                dynamic=spec.activations == "dynamic",
                # The grids of the others are searched by other processes.
                weight_range=weight_range if len(layers) % ranks.count == ranks.rank else "minmax",
                rounding=rounding,
            )
    points = [layer.weight_point for layer in layers.values()]
    grids = ranks.map(lambda point: (point.scale, point.zero_point), points)
    for point, grid in zip(points, grids, strict=True):
        point.set_grid(*grid)
    static = 1 if tabled is not None else rows
    attentions = {name: _wrap_attention(model, name, spec, clock, static, times) for name in description.attentions}
    for name, layer in layers.items():
        replace_module(model, name, layer)
    for name, attention in attentions.items():
        install_attention(model, name, attention)
    clock.attach(model, description.timestep)
    time_layers = description.time_layers_in(description.layers)
    return CalibrationModel(model, clock, layers, attentions, time_layers, description.timestep)


def projection_of(model: nn.Module, attention: str, operand: str) -> str:
    """Name of the layer that computes an operand of an attention; of the attention's module if that is unknown."""
    path = attention.partition(":")[0]
    module = model.get_submodule(path)
    layers = (f"{path}.{layer}" for layer in PROJECTIONS.get(operand, ()) if hasattr(module, layer))
    return next(layers, path)


def _over_time(bits: int, by_row: list[int]) -> tuple[int, Tensor | None]:
    """Bits of an activation, and those of each row if they differ: uint8 [R]."""
    most, row_bits = column(by_row or [bits])
    return (bits, row_bits) if row_bits is not None else (most, None)


def _wrap_attention(
    model: nn.Module, name: str, spec: QuantSpec, clock: StepClock, rows: int, times: Sequence[float]
) -> CalibratedAttention:
    """Query, key and value take the bits of the layers that compute them; the probabilities take the spec's."""
    points: dict[str, Point] = {}
    for operand in OPERANDS:
        projection = projection_of(model, name, operand)
        bits, row_bits = spec.layer_bits(projection).activation, None
        if operand == "probability" and bits != FLOAT_BITS:
            bits = spec.softmax_bits
        else:
            bits, row_bits = _over_time(bits, spec.bits_over_time(projection, bits, times))
        if bits != FLOAT_BITS and spec.activations == "dynamic":
            points[operand] = DynamicPoint(dynamic_grid(bits, None, row_bits), clock)
        elif bits != FLOAT_BITS:
            unsigned = operand == "probability"
            points[operand] = ActivationPoint(bits, clock, rows=rows, unsigned=unsigned, row_bits=row_bits)
    return CalibratedAttention(points)


@torch.no_grad()
def calibrate_ranges(
    calibrated: CalibrationModel,
    samples: CalibrationSet,
    method: ActivationRange,
    batch_size: int,
    progress: Progress,
    *,
    per_row: bool = True,
    quantized_weights: bool = False,
    ranks: Ranks | None = None,
) -> None:
    """Observe every activation of the network on the samples, then search all ranges and quantize to them.

    Args:
        per_row: search a range for every table row; else one for all.
        quantized_weights: observe the network with quantized weights, not the full-precision one.
        ranks: share the samples and the search.
    """
    points = list(calibrated.activation_points())
    if not points:
        return
    for layer in calibrated.layers.values():
        layer.weight_point.bypassed = not quantized_weights
    for point in points:
        point.observe()
    ranks = ranks or Ranks()
    batches = list(samples.batches(batch_size))
    with progress.task("Observing activations", len(batches)) as advance:
        for chosen in batches[ranks.share(len(batches))]:
            calibrated.model(**samples.arguments(chosen))
            advance(ranks.count)
    with progress.task("Searching activation ranges", len(points)) as advance:
        search_ranges(points, method, per_row=per_row, ranks=ranks, advance=advance)
    for layer in calibrated.layers.values():
        layer.weight_point.bypassed = False


def search_ranges(
    points: Sequence[ActivationPoint],
    method: ActivationRange,
    *,
    per_row: bool,
    ranks: Ranks,
    neighbours: int = 0,
    row_zero_points: bool = False,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """`ActivationPoint.calibrate` for points that observed each process's share of the samples."""
    if ranks.count > 1:
        for point in points:
            observations = point.observer.observations
            observations.merge(ranks.gather(observations.parts()))

    def search(point: ActivationPoint) -> tuple[Tensor, Tensor, Start | None]:
        return point.observer.search(method, per_row=per_row, neighbours=neighbours, row_zero_points=row_zero_points)

    grids = ranks.map(search, points)
    for point, grid in zip(points, grids, strict=True):
        point.set_grid(*grid)
        advance(1)
