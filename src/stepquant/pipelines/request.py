"""What a pipeline is to generate: conditions, steps and size, checked against its call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stepquant.errors import StepquantError, first_line
from stepquant.models.denoisers import primary_denoisers
from stepquant.pipelines.call import (
    DESCRIPTION,
    call_parameters,
    kind_of,
    known_labels,
    missing_parameters,
    step_parameters,
)
from stepquant.pipelines.inputs import SCHEDULES, Inputs, joined, split_inputs
from stepquant.pipelines.schedule import most_steps


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        conditions: prompts or class labels, used in turn; empty for a pipeline without either.
        steps: number of denoising steps.
        guidance: scale of classifier-free guidance; None for the default of the pipeline.
        size: height and width in pixels; None for the default of the pipeline.
        inputs: further arguments of the pipeline's call, such as the image it starts from.
        each: arguments that differ between samples, used in turn; empty if there are none.
    """

    conditions: tuple[str | int, ...] = ()
    steps: int = 50
    guidance: float | None = None
    size: int | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    each: tuple[Mapping[str, Any], ...] = ()

    def condition(self, index: int) -> str | int:
        """Return the condition of sample `index`."""
        return self.conditions[index % len(self.conditions)]

    def all_inputs(self) -> dict[str, Any]:
        """Return every input by name; those that differ between samples as a list."""
        return {**self.inputs, **{name: [row[name] for row in self.each] for name in (self.each or ({},))[0]}}

    def inputs_of(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return the inputs of some samples as arguments of one call."""
        each = joined([self.each[index % len(self.each)] for index in indices]) if self.each else {}
        return {**self.inputs, **each}

    def input_of(self, index: int) -> dict[str, Any]:
        """Return the inputs of one sample, for a pipeline that takes one at a time."""
        return {**self.inputs, **(self.each[index % len(self.each)] if self.each else {})}


def make_request(
    pipeline: Any,
    steps: int,
    *,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    guidance: float | None = None,
    size: int | None = None,
    inputs: Inputs | None = None,
) -> Request:
    """Return a request that fits the pipeline; without prompts or labels, it uses the model's own examples in turn.

    Args:
        inputs: further arguments of the call: a dictionary whose values all samples share, or that hold a list or
            tensor with one entry per condition; or a list of dictionaries, one per sample, which are used in turn.

    Raises:
        StepquantError: if an argument does not fit the pipeline, or one that it needs is missing.
    """
    kind, called, parameters = kind_of(pipeline), type(pipeline).__name__, call_parameters(pipeline)
    if guidance is not None and not math.isfinite(guidance):
        raise StepquantError(f"guidance is {guidance}; expected a finite number.")
    if guidance is not None and "guidance_scale" not in parameters:
        raise StepquantError(f"guidance is {guidance}, but {called} has no guidance. Leave out `guidance`.")
    if prompts is not None and kind != "text":
        raise StepquantError(f"prompts were given, but {called} is {DESCRIPTION[kind]}. Leave out `prompts`.")
    if labels is not None and kind != "class":
        raise StepquantError(f"labels were given, but {called} is {DESCRIPTION[kind]}. Leave out `labels`.")
    if size is not None and "height" not in parameters:
        raise StepquantError(f"size is {size}, but {called} generates images of one size. Leave out `size`.")
    conditions: Sequence[str | int] = ()
    if kind == "class":
        conditions = _check_labels(pipeline, labels)
    elif kind == "text":
        conditions = prompts or default_prompts(pipeline)
    shared, each = split_inputs(pipeline, inputs, len(conditions))
    missing = missing_parameters(pipeline, {**shared, **(each[0] if each else {})})
    if missing:
        raise StepquantError(
            f"{called} needs {', '.join(missing)}, and inputs has none. Pass what its call needs as `inputs`, such as "
            f'{{"{missing[0]}": ...}}.'
        )
    steps = next((len(shared[name]) for name in SCHEDULES if shared.get(name) is not None), steps)
    _check_steps(pipeline, steps)
    return Request(tuple(conditions), steps, guidance, size, shared, tuple(each))


def _check_steps(pipeline: Any, steps: int) -> None:
    if steps < 1:
        raise StepquantError(f"steps is {steps}; expected at least 1.")
    most = most_steps(getattr(pipeline, "scheduler", None)) if step_parameters(pipeline) else None
    if most is not None and steps > most:
        raise StepquantError(
            f"steps is {steps}; expected at most the {most} timesteps that the model has. "
            f"Set `steps` to {most} or fewer."
        )


def _check_labels(pipeline: Any, labels: Sequence[int] | None) -> Sequence[int]:
    """Return the labels, all that exist by default; raises `StepquantError` for one that does not exist."""
    known = known_labels(pipeline)
    if known is None:
        if not labels:
            raise StepquantError(f"{type(pipeline).__name__} does not say how many classes it has. Give `labels`.")
        return labels
    for label in labels or ():
        if label not in known:
            raise StepquantError(f"label {label} does not exist; expected {known[0]} to {known[-1]}.")
    return labels or known


def default_prompts(pipeline: Any) -> list[str]:
    """Return the prompts that a model ships with (``prompts.txt`` in its folder), else a general list."""
    shipped = Path(str(getattr(pipeline.config, "_name_or_path", ""))) / "prompts.txt"
    return read_prompts(shipped if shipped.is_file() else Path(__file__).with_name("prompts.txt"))


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a file that are not blank; raises `StepquantError` if it has none or cannot be read."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise StepquantError(f"prompts file {path} cannot be read: {first_line(error)}.") from None
    if not prompts:
        raise StepquantError(f"prompts file {path} is empty; expected one prompt per line.")
    return prompts


def check_dtype(pipeline: Any) -> None:
    """Raise `StepquantError` if the pipeline cannot output images in its dtype."""
    if "batch_size" in call_parameters(pipeline) and any(
        getattr(denoiser, "dtype", None) == torch.bfloat16 for denoiser in primary_denoisers(pipeline).values()
    ):
        raise StepquantError(
            f"{type(pipeline).__name__} outputs NumPy arrays, which cannot be bfloat16; expected dtype float32 or "
            "float16. Load the pipeline with another dtype."
        )
