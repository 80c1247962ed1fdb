"""What the call of a pipeline takes, read from its signature."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from stepquant.models.denoisers import primary_denoisers

Kind = Literal["unconditional", "class", "text"]

DESCRIPTION: dict[Kind, str] = {
    "unconditional": "unconditional",
    "class": "conditioned on class labels",
    "text": "conditioned on text",
}
CLASS_COUNTS = ("num_embeds_ada_norm", "num_class_embeds")
"""Entries of a denoiser's configuration that hold the number of classes."""
STEPS = "num_inference_steps"
"""How the names of parameters end that take a number of steps; those of a prior or a decoder have a prefix."""


def call_parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the pipeline's ``__call__``."""
    return inspect.signature(type(pipeline).__call__).parameters


def kind_of(pipeline: Any) -> Kind:
    """Return what the samples of a pipeline are conditioned on, besides images and the like."""
    parameters = call_parameters(pipeline)
    if "prompt" in parameters:
        return "text"
    if "class_labels" not in parameters:
        return "unconditional"
    required = parameters["class_labels"].default is inspect.Parameter.empty
    return "class" if required or known_labels(pipeline) is not None else "unconditional"


def known_labels(pipeline: Any) -> Sequence[int] | None:
    """Return the class labels that a pipeline knows, ascending; None if their number is not known."""
    named = getattr(pipeline, "labels", None)
    if named:
        return sorted(set(named.values()))
    for denoiser in primary_denoisers(pipeline).values():
        config = getattr(denoiser, "config", {})
        for entry in CLASS_COUNTS:
            if config.get(entry):
                return range(config[entry])
    return None


def step_parameters(pipeline: Any) -> list[str]:
    """Return the parameters that take a number of denoising steps, such as ``prior_num_inference_steps``."""
    return [name for name in call_parameters(pipeline) if name.endswith(STEPS)]


def missing_parameters(pipeline: Any, inputs: Mapping[str, Any]) -> list[str]:
    """Return the parameters without a default that are neither a condition nor among `inputs`."""
    parameters = list(call_parameters(pipeline).values())[1:]
    return [
        parameter.name
        for parameter in parameters
        if parameter.default is inspect.Parameter.empty
        and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        and parameter.name not in {"prompt", "class_labels", "batch_size", *inputs}
    ]


def takes_batches(pipeline: Any) -> bool:
    """Return whether one call generates several samples with a condition each.

    Pipelines without prompts, class labels and batch size take one sample at a time (Stable Video Diffusion), and so
    do those whose prompt is a single string (Shap-E).
    """
    parameters = call_parameters(pipeline)
    if "prompt" in parameters:
        annotation = str(parameters["prompt"].annotation)
        return "str" not in annotation or "list" in annotation.lower()
    return "class_labels" in parameters or "batch_size" in parameters


def gives_latents(pipeline: Any) -> bool:
    """Return whether the call compares its ``output_type`` with ``"latent"``, and so can leave out decoding."""
    code = inspect.unwrap(type(pipeline).__call__).__code__
    return "output_type" in call_parameters(pipeline) and "latent" in _strings(code.co_consts)


def _strings(constants: Any) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple | frozenset):
            yield from _strings(constant)
