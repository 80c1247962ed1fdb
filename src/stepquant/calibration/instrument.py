"""Put quantizers on every layer and attention of a copy of the denoiser, and take what they learned off again."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.activation import ActivationQuantizer
from stepquant.calibration.fake_quant.layers import TrainableAttention, TrainableLayer, wrap
from stepquant.calibration.fake_quant.weight import WeightQuantizer
from stepquant.calibration.samples import CalibrationSet
from stepquant.config import FLOAT_BITS, QuantSpec
from stepquant.core.qtensor import InvalidGrid
from stepquant.core.ranges import RangeMethod
from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.layers.clock import StepClock
from stepquant.layers.format import OPERANDS
from stepquant.layers.install import Quantization
from stepquant.layers.quantized import can_quantize, replace_module
from stepquant.models import ModelDescription
from stepquant.progress import Progress


@dataclass(frozen=True)
class Instrumented:
    """A copy of a denoiser whose layers carry quantizers.

    Attributes:
        model: the copy; runs like the original. Activation quantizers start switched off, weights start rounded to
            nearest.
        clock: attached to `model`.
        layers: name -> layer under calibration; names are those of the original model.
        attentions: name of an `Attention` -> its processor.
        time_layers: names of the linears whose input depends on the timestep alone, quantized or not.
        trained: names of the parameters outside `layers` that were trained, and ship with them.
    """

    model: nn.Module
    clock: StepClock
    layers: dict[str, TrainableLayer]
    attentions: dict[str, TrainableAttention]
    time_layers: tuple[str, ...] = ()
    trained: list[str] = field(default_factory=list)

    def activation_quantizers(self, block: str | None = None) -> Iterator[ActivationQuantizer]:
        """All activation quantizers, or those inside one block."""
        root = self.model if block is None else self.model.get_submodule(block)
        for module in root.modules():
            if isinstance(module, ActivationQuantizer):
                yield module

    def layers_in(self, block: str) -> dict[str, TrainableLayer]:
        """The layers inside one block, which may itself be a layer."""
        return {name: layer for name, layer in self.layers.items() if name == block or name.startswith(f"{block}.")}

    def learned(self) -> dict[str, Tensor]:
        """Everything found and learned so far, by name: what later stages start from."""
        state: dict[str, Tensor] = {"timesteps": self.clock.timesteps}
        for name, layer in self.layers.items():
            state[f"{name}.codes"] = layer.weight_quantizer.codes(layer.weight)
            state[f"{name}.scale"] = layer.weight_quantizer.scale
            if layer.inner.bias is not None:
                state[f"{name}.bias"] = layer.inner.bias
        for index, quantizer in enumerate(self.activation_quantizers()):
            state[f"{index}.scale"], state[f"{index}.zero_point"] = quantizer.scale, quantizer.zero_point
        return state

    def freeze(self) -> Quantization:
        """The integers and tables, as they ship; raises `StepquantError` where they break an invariant of theirs."""
        return Quantization(
            self.clock.timesteps,
            {name: _frozen(name, layer) for name, layer in self.layers.items()},
            {name: _frozen(name, attention) for name, attention in self.attentions.items() if attention.quantizers},
            self.time_layers,
            parameters={name: self.model.get_parameter(name).detach().cpu().clone() for name in self.trained},
        )


def _frozen(name: str, part: Any) -> Any:
    """A layer or attention under calibration -> its integers and tables, checked."""
    try:
        frozen = part.freeze()
        frozen.check()
    except InvalidGrid as error:
        raise StepquantError(f"the quantizers of {name} have found what cannot be stored: {error.what}.") from None
    return frozen


def check_overrides(description: ModelDescription, spec: QuantSpec) -> None:
    """Raise `StepquantError` if an override of the spec matches no layer."""
    for pattern in spec.overrides:
        if not any(re.search(pattern, name) for name in description.layers):
            raise StepquantError(f"override {pattern!r} matches none of the layers: `stepquant inspect` lists them.")


def instrument(
    denoiser: nn.Module,
    description: ModelDescription,
    spec: QuantSpec,
    *,
    timesteps: Tensor | None = None,
    weight_range: RangeMethod = "least-error",
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    weight_quantizer: type[WeightQuantizer] = WeightQuantizer,
    activation_quantizer: type[ActivationQuantizer] = ActivationQuantizer,
) -> Instrumented:
    """Copy `denoiser` and put quantizers on it.

    Args:
        timesteps: float [R]: makes every activation table per-step, one row for each; None means static scales.
        weight_range: how weight ranges are found.
        ranks: share the search.
        weight_quantizer, activation_quantizer: classes of one's own, derived from ours.

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
    layers: dict[str, TrainableLayer] = {}
    ranks = ranks or Ranks()
    quantized = description.quantized_bits(spec)
    with (progress or Progress()).task("Searching weight ranges", len(quantized)) as advance:
        for name, bits in quantized.items():
            advance(1)
            layers[name] = wrap(
                model.get_submodule(name),
                bits.weight,
                None if bits.activation == FLOAT_BITS else bits.activation,
                clock,
                split=description.skip_splits.get(name) if spec.split_skips else None,
                group_size=spec.group_size,
                rows=rows,
                # The others get what the process whose turn it is finds.
                weight_range=weight_range if len(layers) % ranks.count == ranks.rank else "minmax",
                weight_quantizer=weight_quantizer,
                activation_quantizer=activation_quantizer,
            )
    weights = [layer.weight_quantizer for layer in layers.values()]
    grids = ranks.map(lambda weight: (weight.scale, weight.zero_point), weights)
    for weight, (scale, zero_point) in zip(weights, grids, strict=True):
        weight.scale, weight.zero_point = scale, zero_point
    attentions = {
        name: _wrap_attention(name, spec, clock, rows, activation_quantizer) for name in description.attentions
    }
    for name, layer in layers.items():
        replace_module(model, name, layer)
    for name, attention in attentions.items():
        model.get_submodule(name).set_processor(attention)  # type: ignore[operator]
    clock.attach(model)
    time_layers = tuple(name for name in description.layers if name in description.time_layers)
    return Instrumented(model, clock, layers, attentions, time_layers)


def _wrap_attention(
    name: str, spec: QuantSpec, clock: StepClock, rows: int, quantizer: type[ActivationQuantizer]
) -> TrainableAttention:
    """Query, key and value take the bits of the layer that makes them; the probabilities take the spec's."""
    quantizers: dict[str, ActivationQuantizer] = {}
    for operand in OPERANDS:
        projection = name if operand == "probability" else f"{name}.to_{operand[0]}"
        bits = spec.layer_bits(projection).activation
        if operand == "probability" and bits != FLOAT_BITS:
            bits = spec.softmax_bits
        if bits != FLOAT_BITS:
            quantizers[operand] = quantizer(bits, clock, rows=rows, unsigned=operand == "probability")
    return TrainableAttention(quantizers)


@torch.no_grad()
def calibrate_ranges(
    instrumented: Instrumented,
    samples: CalibrationSet,
    method: RangeMethod,
    batch_size: int,
    progress: Progress,
    *,
    per_row: bool = True,
    quantized_weights: bool = False,
    ranks: Ranks | None = None,
) -> None:
    """Observe every activation of the network on the samples, then set all ranges and switch them on.

    Args:
        per_row: a range for every table row; else one for all.
        quantized_weights: observe what the quantized weights make of the samples, not the full-precision ones.
        ranks: share the samples and the search.
    """
    quantizers = list(instrumented.activation_quantizers())
    for layer in instrumented.layers.values():
        layer.quantizing_weight = quantized_weights
    for quantizer in quantizers:
        quantizer.observing = True
    ranks = ranks or Ranks()
    batches = list(samples.batches(batch_size))
    with progress.task("Observing activations", len(batches)) as advance:
        for chosen in batches[ranks.share(len(batches))]:
            instrumented.model(**samples.arguments(chosen))
            advance(ranks.count)
    with progress.task("Searching activation ranges", len(quantizers)) as advance:
        search_ranges(quantizers, method, per_row=per_row, ranks=ranks, advance=advance)
    for layer in instrumented.layers.values():
        layer.quantizing_weight = True


def search_ranges(
    quantizers: Sequence[ActivationQuantizer],
    method: RangeMethod,
    *,
    per_row: bool,
    ranks: Ranks,
    neighbours: int = 0,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Set the range of quantizers that have observed each process's share of the samples: `set_range` of each."""

    def search(quantizer: ActivationQuantizer) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        quantizer.set_range(method, per_row=per_row, neighbours=neighbours)
        return quantizer.scale, quantizer.zero_point, quantizer.found_gain

    if ranks.count > 1:
        for quantizer in quantizers:
            quantizer.observations.merge(ranks.gather(quantizer.observations.parts()))
    for quantizer, found in zip(quantizers, ranks.map(search, quantizers), strict=True):
        quantizer.take_range(*found)
        advance(1)
