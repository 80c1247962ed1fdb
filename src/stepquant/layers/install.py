"""Turn a full-precision denoiser into a quantized one: swap its layers for quantized layers, empty or filled."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from torch import Tensor, nn

from stepquant.core.qtensor import QuantizedAttention, QuantizedLayer
from stepquant.errors import StepquantError
from stepquant.layers.attention import OPERANDS, QuantizedAttentionProcessor
from stepquant.layers.clock import StepClock, reads_timestep
from stepquant.layers.correction import Correction, OutputCorrection, correction_of
from stepquant.layers.lora import enable_lora
from stepquant.layers.modules import (
    MOST_ROWS,
    Bits,
    LayerFormat,
    QuantizedConv2d,
    QuantizedLinear,
    QuantizedModule,
    can_quantize,
)
from stepquant.layers.time_cache import TimeLinear, TimeMemo


class OperandFormat(BaseModel):
    """Bits and table rows of one operand of an attention."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bits: Bits
    rows: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 1


class Structure(BaseModel):
    """The shape of a quantized denoiser, as its configuration holds it; `install_empty` rebuilds the layers from it.

    Attributes:
        timesteps: what the rows of per-step tables stand for, strictly ascending.
        layers: module name -> format.
        attentions: name of an `Attention` -> operand ("query", "key", "value", "probability") -> format.
        time_layers: linears, quantized or not, whose outputs are remembered by timestep (`TimeMemo`).
        correction_rows: of the output's correction; 0 for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    timesteps: Annotated[list[FiniteFloat], Field(min_length=1, max_length=MOST_ROWS)]
    layers: dict[str, LayerFormat]
    attentions: dict[str, dict[str, OperandFormat]]
    time_layers: list[str] = []
    correction_rows: Annotated[int, Field(ge=0, le=MOST_ROWS)] = 0

    @model_validator(mode="after")
    def _consistent(self) -> Structure:
        if any(later <= earlier for earlier, later in pairwise(self.timesteps)):
            raise ValueError("timesteps must be strictly ascending")
        rows = {name: {layer.activation_rows} for name, layer in self.layers.items()}
        for name, operands in self.attentions.items():
            if not set(operands) <= set(OPERANDS):
                raise ValueError(f"operands of {name} must be among {', '.join(OPERANDS)}")
            rows[name] = {operand.rows for operand in operands.values()}
        # Kernels look up the clock's row without asking how many there are.
        for name, counts in rows.items():
            if not counts <= {1, len(self.timesteps)}:
                raise ValueError(
                    f"tables of {name} must have 1 row, or one for each of {len(self.timesteps)} timesteps"
                )
        return self

    @classmethod
    def parse(cls, structure: Structure | dict[str, Any]) -> Structure:
        """Raises `StepquantError` where `structure` is not of this shape."""
        try:
            return cls.model_validate(structure)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise StepquantError(
                f"quantization structure: {where}: {first['msg']}: the checkpoint is damaged, quantize the model again."
            ) from None


@dataclass(frozen=True)
class Quantization:
    """Everything that calibration found out about one denoiser.

    Attributes:
        timesteps: float32 [R], ascending: what the rows of per-step tables stand for ([1] when all are static).
        layers: module name -> integers and tables.
        attentions: name of an `Attention` -> tables of its operands.
        time_layers: names of linears whose input depends on the timestep alone.
        correction: of the denoiser's output, if one was estimated.
        parameters: those that stay in floating point, where they are not the original's: training moves norms too.
    """

    timesteps: Tensor
    layers: dict[str, QuantizedLayer]
    attentions: dict[str, QuantizedAttention] = field(default_factory=dict)
    time_layers: tuple[str, ...] = ()
    correction: Correction | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def structure(self) -> dict[str, Any]:
        """JSON-able `Structure` of this quantization."""
        attentions = {
            name: {
                operand: OperandFormat(bits=table.bits, rows=table.scale.shape[0])
                for operand in OPERANDS
                if (table := getattr(attention, operand)) is not None
            }
            for name, attention in self.attentions.items()
        }
        layers = {name: LayerFormat.of(layer) for name, layer in self.layers.items()}
        structure = Structure(
            timesteps=self.timesteps.tolist(),
            layers=layers,
            attentions=attentions,
            time_layers=list(self.time_layers),
            correction_rows=0 if self.correction is None else len(self.correction.timesteps),
        )
        return structure.model_dump(mode="json")


def install(model: nn.Module, quantization: Quantization) -> StepClock:
    """Replace the layers of `model` (full precision, changed in place) by filled quantized ones.

    Kernels are not installed yet: call ``stepquant.runtime.prepare``. Returns the model's clock, attached where the
    model has a timestep.
    """
    clock = install_empty(model, quantization.structure())
    for name, layer in quantization.layers.items():
        module = model.get_submodule(name)
        assert isinstance(module, QuantizedModule)
        module.fill(layer)
    for name, attention in quantization.attentions.items():
        processor = model.get_submodule(name).processor
        assert isinstance(processor, QuantizedAttentionProcessor)
        processor.fill(attention)
    correction = correction_of(model)
    if correction is not None and quantization.correction is not None:
        correction.fill(quantization.correction)
    for name, value in quantization.parameters.items():
        model.get_parameter(name).data.copy_(value)
    return clock


def install_empty(model: nn.Module, structure: Structure | dict[str, Any], device: str = "cpu") -> StepClock:
    """Replace the layers named by `structure` with empty quantized ones, to be filled from a state dict.

    On ``device="meta"`` nothing is allocated: fill with ``load_state_dict(..., assign=True)``.

    Raises:
        StepquantError: if `structure` is malformed, or names a layer that `model` does not have or of another kind.
    """
    structure = Structure.parse(structure)
    with torch.device("cpu"):  # transformers builds its models under a device without memory
        clock = StepClock(torch.tensor(structure.timesteps, dtype=torch.float32))
    with torch.device(device):
        for name, layer_format in structure.layers.items():
            module = _submodule(model, name)
            if not can_quantize(module):
                raise StepquantError(
                    f"layer {name!r} is a {type(module).__name__}, expected a linear or a convolution."
                )
            if layer_format.smoothed and getattr(module, "groups", 1) > 1:
                raise StepquantError(f"layer {name!r} has channel groups and cannot be smoothed: it is damaged.")
            channels, groups = _input_channels(module), layer_format.activation_groups
            if groups and sum(groups) != channels:
                raise StepquantError(
                    f"layer {name!r} has {channels} input channels, its activation groups have {sum(groups)}: the "
                    "checkpoint is damaged, quantize the model again."
                )
            replace_module(model, name, _empty_like(module, layer_format, clock))
        for name, operands in structure.attentions.items():
            bits = {operand: operand_format.bits for operand, operand_format in operands.items()}
            rows = {operand: operand_format.rows for operand, operand_format in operands.items()}
            attention = _submodule(model, name)
            if not hasattr(attention, "set_processor"):
                raise StepquantError(f"{name!r} is a {type(attention).__name__}, expected an attention.")
            attention.set_processor(QuantizedAttentionProcessor(bits, rows, clock))
        for name in structure.time_layers:
            _remember(model, name, clock)
        if structure.correction_rows:
            OutputCorrection(structure.correction_rows, clock).attach(model)
    if reads_timestep(model):
        clock.attach(model)
    enable_lora(model)
    return clock


def quantized_like(module: nn.Module, layer: QuantizedLayer, clock: StepClock) -> QuantizedModule:
    """A quantized layer in the shape of `module`, filled with `layer`; without a kernel yet."""
    quantized = _empty_like(module, LayerFormat.of(layer), clock)
    quantized.fill(layer)
    return quantized


def _empty_like(module: nn.Module, layer_format: LayerFormat, clock: StepClock) -> QuantizedModule:
    if isinstance(module, nn.Linear):
        return QuantizedLinear.like(module, layer_format, clock)
    assert isinstance(module, nn.Conv2d)
    return QuantizedConv2d.like(module, layer_format, clock)


def _input_channels(module: nn.Module) -> int:
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels  # type: ignore[return-value]


def _remember(model: nn.Module, name: str, clock: StepClock) -> None:
    """Let a time layer look up what it has computed before."""
    module = _submodule(model, name)
    if isinstance(module, QuantizedLinear):
        module.memo = TimeMemo()
    elif isinstance(module, nn.Linear):
        replace_module(model, name, TimeLinear.like(module, clock))
    else:
        raise StepquantError(f"time layer {name!r} is a {type(module).__name__}, expected a linear.")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place that the dotted `name` has in `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def quantized_modules(model: nn.Module) -> dict[str, QuantizedModule]:
    """All quantized linears and convolutions of `model`, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedModule)}


def made_by_quantization(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of all tensors that quantization made: of quantized layers, attentions, the correction."""
    kinds = (QuantizedModule, QuantizedAttentionProcessor, OutputCorrection)
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, kinds))


def _submodule(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise StepquantError(f"the model has no layer {name!r}: the checkpoint belongs to another model.") from None
