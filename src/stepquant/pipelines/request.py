"""What a pipeline is to generate: conditions, steps and size, checked against its call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from stepquant.errors import StepquantError, first_line
from stepquant.models import denoiser_name

Kind = Literal["unconditional", "class", "text"]

DESCRIPTION: dict[Kind, str] = {
    "unconditional": "unconditional",
    "class": "conditioned on class labels",
    "text": "conditioned on text",
}


def kind_of(pipeline: Any) -> Kind:
    """Return what the images of a pipeline are conditioned on, according to the signature of its call."""
    parameters = call_parameters(pipeline)
    if "prompt" in parameters:
        return "text"
    return "class" if "class_labels" in parameters else "unconditional"


def call_parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the pipeline's ``__call__``."""
    return inspect.signature(type(pipeline).__call__).parameters


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        conditions: prompts or class labels, used in turn; empty for an unconditional pipeline.
        steps: number of denoising steps.
        guidance: scale of classifier-free guidance; None for the default of the pipeline.
        size: height and width in pixels; None for the default of the pipeline.
        inputs: further arguments of the pipeline's call, such as the image it starts from.
    """

    conditions: tuple[str | int, ...] = ()
    steps: int = 50
    guidance: float | None = None
    size: int | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def condition(self, index: int) -> str | int:
        """Return the condition of image `index`."""
        return self.conditions[index % len(self.conditions)]


def make_request(
    pipeline: Any,
    steps: int,
    *,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    guidance: float | None = None,
    size: int | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Request:
    """Return a request that fits the pipeline; without prompts or labels, it uses the model's own examples in turn.

    Raises:
        StepquantError: if an argument does not fit the pipeline, or an image that the pipeline needs is missing.
    """
    kind = kind_of(pipeline)
    _check_steps(pipeline, steps)
    if guidance is not None and not math.isfinite(guidance):
        raise StepquantError(f"guidance is {guidance}; expected a finite number.")
    name = f"{type(pipeline).__name__} is {DESCRIPTION[kind]}"
    if prompts is not None and kind != "text":
        raise StepquantError(f"prompts were given, but {name}. Leave out `prompts`.")
    if labels is not None and kind != "class":
        raise StepquantError(f"labels were given, but {name}. Leave out `labels`.")
    inputs = dict(inputs or {})
    _check_inputs(pipeline, inputs, size)
    conditions: Sequence[str | int] = ()
    if kind == "class":
        conditions = _check_labels(pipeline, labels)
    elif kind == "text":
        conditions = prompts or default_prompts(pipeline)
    return Request(tuple(conditions), steps, guidance, size, inputs)


def _check_steps(pipeline: Any, steps: int) -> None:
    if steps < 1:
        raise StepquantError(f"steps is {steps}; expected at least 1.")
    trained = getattr(pipeline.scheduler.config, "num_train_timesteps", steps)
    if steps > trained:
        raise StepquantError(f"steps is {steps}; expected at most the {trained} timesteps that the model has.")


def _check_inputs(pipeline: Any, inputs: Mapping[str, Any], size: int | None) -> None:
    name, parameters = type(pipeline).__name__, call_parameters(pipeline)
    for key in inputs:
        if key not in parameters:
            raise StepquantError(
                f"inputs contains {key!r}, which is not an argument of {name}; expected arguments of its call."
            )
    if "image" in parameters and "image" not in inputs:
        raise StepquantError(
            f"{name} starts from an image, and none was given. Pass what its call needs as `inputs`, such as "
            "inputs={'image': ...}, or quantize the denoiser through a pipeline that starts from noise."
        )
    if size is not None and "height" not in parameters:
        raise StepquantError(f"size is {size}, but {name} generates images of one size. Leave out `size`.")


def _check_labels(pipeline: Any, labels: Sequence[int] | None) -> Sequence[int]:
    """Return the labels, all that exist by default; raises `StepquantError` for one that does not exist."""
    named = getattr(pipeline, "labels", None)
    known = sorted(set(named.values())) if named else range(pipeline.transformer.config.num_embeds_ada_norm)
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
    if kind_of(pipeline) == "unconditional" and getattr(pipeline, denoiser_name(pipeline)).dtype == torch.bfloat16:
        raise StepquantError(
            f"{type(pipeline).__name__} outputs NumPy arrays, which cannot be bfloat16; expected dtype float32 or "
            "float16. Load the pipeline with another dtype."
        )
