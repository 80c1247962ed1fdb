"""The parts of a file of ``stepquant sensitivity`` that a report shows."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from stepquant.errors import StepquantError
from stepquant.report.files import read_file

MEANING = {
    "one-at-a-time": "Relative squared error of the denoiser's output while this layer alone is quantized.",
    "leave-one-out": "How much the output's relative squared error falls when this layer alone keeps full precision.",
}


class LayerSensitivity(BaseModel):
    """One layer: its bits during the measurement, and its error over all steps and in each group of steps."""

    model_config = ConfigDict(frozen=True)

    name: str
    bits: str
    error: float
    errors: list[float]


class SensitivityFile(BaseModel):
    """The parts of ``sensitivity.json`` in a report.

    Attributes:
        method: how it was measured, see `MEANING`.
        step_groups: first and last sampler step of each group; step 0 is pure noise.
        layers: in execution order.
    """

    model_config = ConfigDict(frozen=True)

    method: Literal["one-at-a-time", "leave-one-out"]
    samples: int
    step_groups: Annotated[list[tuple[int, int]], Field(min_length=1)]
    layers: Annotated[list[LayerSensitivity], Field(min_length=1)]


def read_sensitivity(path: Path, layers: Collection[str]) -> SensitivityFile:
    """Read a file of ``stepquant sensitivity`` about the model with these layers.

    Raises:
        StepquantError: if it cannot be read, is not valid, or was measured on another model.
    """
    expected = "sensitivity.json that stepquant sensitivity wrote"
    measured = read_file(path, SensitivityFile, "sensitivity file", expected)
    groups = len(measured.step_groups)
    for layer in measured.layers:
        if layer.name not in layers:
            raise StepquantError(f"{path} was measured on another model; this one has no layer {layer.name!r}.")
        if len(layer.errors) != groups:
            raise StepquantError(f"{path} is damaged; expected {groups} errors for layer {layer.name!r}.")
    return measured
