"""Files of other commands that a report shows: sensitivities of layers, and the duration of a quantization."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stepquant.errors import StepquantError

MEANING = {
    "one-at-a-time": "Relative squared error of the denoiser's output while this layer alone is quantized.",
    "leave-one-out": "How much the output's relative squared error falls when this layer alone keeps full precision.",
}
ModelT = TypeVar("ModelT", bound=BaseModel)
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


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


class Times(BaseModel):
    """Duration of a quantization, in a file beside the checkpoint, whose bytes depend on its inputs alone.

    Attributes:
        out: name of the checkpoint folder.
        seconds: duration of the run; of a resumed run, since the resumption.
        stages: seconds of each stage, in order.
        threads: CPU threads.
    """

    model_config = ConfigDict(frozen=True)

    out: str
    seconds: Seconds
    stages: dict[str, Seconds]
    threads: int


def read_sensitivity(path: Path, layers: Collection[str]) -> SensitivityFile:
    """Read a file of ``stepquant sensitivity`` about the model with these layers.

    Raises:
        StepquantError: if it cannot be read, is not valid, or was measured on another model.
    """
    measured = _read(path, SensitivityFile, "sensitivity file", "sensitivity.json that stepquant sensitivity wrote")
    groups = len(measured.step_groups)
    for layer in measured.layers:
        if layer.name not in layers:
            raise StepquantError(f"{path} was measured on another model; this one has no layer {layer.name!r}.")
        if len(layer.errors) != groups:
            raise StepquantError(f"{path} is damaged; expected {groups} errors for layer {layer.name!r}.")
    return measured


def read_times(path: Path, folder: Path) -> Times:
    """Read a file of ``stepquant quantize --times`` about `folder`.

    Raises:
        StepquantError: if it cannot be read, is not valid, or is about another folder.
    """
    times = _read(path, Times, "times file", "file that stepquant quantize --times wrote")
    if times.out != folder.resolve().name:
        raise StepquantError(f"{path} is about {times.out}; expected the file of {folder}.")
    return times


def _read(path: Path, kind: type[ModelT], what: str, expected: str) -> ModelT:
    """Read and validate a JSON file; `what` and `expected` describe it in error messages."""
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StepquantError(f"{what} {path} cannot be read: {error}.") from None
    except ValidationError:
        raise StepquantError(f"{path} is not valid; expected a {expected}.") from None
