"""Shape of a quantized model as JSON, stored in its configuration, from which its layers are rebuilt."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from stepquant.core.dynamic import DynamicFormat
from stepquant.core.qtensor import GridFormat, QuantizedLayer
from stepquant.core.row_bits import MOST_ROWS
from stepquant.core.transforms import KINDS
from stepquant.errors import StepquantError

OPERANDS = ("query", "key", "value", "probability")
"""Operands of an attention that can be quantized."""


class TransformFormat(BaseModel):
    """Kind of a layer's transform."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: str

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        if kind not in KINDS:
            raise ValueError(f"unknown transform {kind!r}; expected {' or '.join(KINDS)}")
        return kind


class LayerFormat(BaseModel):
    """Shape of a `QuantizedLayer`.

    Attributes:
        weight: format of the weight's grid.
        input: format of the input's grid, fixed or dynamic; None if the activation stays in floating point.
        transforms: in the order in which they are applied.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    weight: GridFormat
    input: GridFormat | DynamicFormat | None = None
    transforms: Annotated[tuple[TransformFormat, ...], Field(strict=False)] = ()

    @model_validator(mode="after")
    def _consistent(self) -> LayerFormat:
        kinds = [transform.kind for transform in self.transforms]
        if len(set(kinds)) < len(kinds):
            raise ValueError("a transform appears twice")
        if kinds and self.input is None:
            raise ValueError("transforms need a quantized input")
        if self.weight.rows != 1:
            raise ValueError("the grid of a weight has 1 row")
        return self

    @classmethod
    def of(cls, layer: QuantizedLayer) -> LayerFormat:
        transforms = tuple(TransformFormat(kind=transform.kind) for transform in layer.transforms)
        grid = None if layer.input is None else layer.input.format
        return cls(weight=layer.weight.grid.format, input=grid, transforms=transforms)


class Structure(BaseModel):
    """Shape of a quantized model; `stepquant.layers.install.install_empty` rebuilds the layers from it.

    Attributes:
        timesteps: timesteps of the rows of per-step tables, strictly ascending.
        layers: module name -> format.
        attentions: name of an attention (see `stepquant.layers.interception`) -> one of `OPERANDS` -> format.
        time_layers: linears, quantized or not, whose outputs are cached by timestep (`TimeCache`).
        correction_rows: rows of the output correction; 0 without one.
        timestep: name of the timestep among the parameters of the denoiser's forward.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    timesteps: Annotated[list[FiniteFloat], Field(min_length=1, max_length=MOST_ROWS)]
    layers: dict[str, LayerFormat]
    attentions: dict[str, dict[str, GridFormat | DynamicFormat]]
    time_layers: list[str] = []
    correction_rows: Annotated[int, Field(ge=0, le=MOST_ROWS)] = 0
    timestep: str = "timestep"

    @model_validator(mode="after")
    def _consistent(self) -> Structure:
        if any(later <= earlier for earlier, later in pairwise(self.timesteps)):
            raise ValueError("timesteps must be strictly ascending")
        rows = {name: {layer.input.rows} for name, layer in self.layers.items() if layer.input is not None}
        for name, operands in self.attentions.items():
            if not set(operands) <= set(OPERANDS) or any(operand.groups for operand in operands.values()):
                raise ValueError(f"operands of {name} must be among {', '.join(OPERANDS)}, without groups")
            rows[name] = {operand.rows for operand in operands.values()}
        # Kernels index tables by the clock's row without a bounds check.
        for name, counts in rows.items():
            if not counts <= {1, len(self.timesteps)}:
                raise ValueError(
                    f"tables of {name} must have 1 row, or one for each of {len(self.timesteps)} timesteps"
                )
        return self

    @classmethod
    def parse(cls, structure: Structure | dict[str, Any]) -> Structure:
        """Validate `structure`; raises `StepquantError` if it is malformed."""
        try:
            return cls.model_validate(structure)
        except ValidationError as error:
            first = error.errors()[0]
            where, what = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
            raise StepquantError(
                f"quantization structure: {where}: {what}. The checkpoint is damaged, or a newer stepquant wrote it; "
                "quantize the model again, or upgrade stepquant."
            ) from None
