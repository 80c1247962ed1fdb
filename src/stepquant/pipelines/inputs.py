"""Further arguments of a pipeline's call: shared by all samples, or different for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepquant.errors import StepquantError
from stepquant.pipelines.call import STEPS, call_parameters

Inputs = Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""Name of an argument -> value; or a list of such dictionaries, one per sample."""

RESERVED = {
    "prompt": "`prompts`",
    "class_labels": "`labels`",
    "generator": "`seed`",
    "latents": "`seed`",
    STEPS: "`steps`",
    **dict.fromkeys(
        (
            "batch_size",
            "num_images_per_prompt",
            "num_videos_per_prompt",
            "num_waveforms_per_prompt",
            "return_dict",
        )
    ),
}
"""Arguments that are not inputs -> what to give instead."""
SCHEDULES = ("timesteps", "sigmas")
"""Arguments whose list is one value: the steps of the sampler."""
VIDEOS = ("video", "frames")
"""Parts of the names of arguments that take a list of images for one sample."""


def split_inputs(pipeline: Any, inputs: Inputs | None, count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the shared inputs, and those of each sample in turn (an empty list if all are shared).

    In a dictionary, a list or array with one entry per condition holds an input per sample, as in diffusers' own calls.

    Args:
        count: number of conditions (prompts or class labels); 0 for a pipeline without, where the inputs decide.

    Raises:
        StepquantError: for an argument that the pipeline's call does not have or that is not an input, for dictionaries
            with different keys, or lists of different lengths.
    """
    if isinstance(inputs, Mapping) or inputs is None:
        given = dict(inputs or {})
        check_names(pipeline, given)
        lengths = {name: _length(name, value) for name, value in given.items()}
        found = {length for length in lengths.values() if length > 1}
        if not count and len(found) > 1:
            raise StepquantError(f"inputs has lists of {min(found)} and {max(found)} entries; expected one per sample.")
        count = count or max(found, default=1)
        each = [name for name, length in lengths.items() if length == count > 1]
        shared = {name: value for name, value in given.items() if name not in each}
        return shared, [{name: _entry(given[name], index) for name in each} for index in range(count * bool(each))]
    rows = [dict(row) for row in inputs if isinstance(row, Mapping)]
    if len(rows) != len(inputs) or not rows:
        raise StepquantError("inputs is a list; expected one dictionary of arguments per sample.")
    for row in rows:
        check_names(pipeline, row)
        if row.keys() != rows[0].keys():
            raise StepquantError(
                f"inputs has the arguments {sorted(row)} for one sample and {sorted(rows[0])} for another; expected "
                "the same ones for every sample."
            )
    return {}, rows


def check_names(pipeline: Any, inputs: Mapping[str, Any]) -> None:
    """Raise `StepquantError` for a name that is not an input of the pipeline's call."""
    parameters = call_parameters(pipeline)
    for name in inputs:
        if name not in parameters:
            raise StepquantError(
                f"inputs contains {name!r}, which is not an argument of {type(pipeline).__name__}; expected arguments "
                f"of its call: {', '.join(key for key in list(parameters)[1:] if key not in RESERVED)}."
            )
        if name in RESERVED:
            instead = f"Give {RESERVED[name]} instead" if RESERVED[name] else "Leave it out"
            raise StepquantError(f"inputs contains {name!r}, which is not an input. {instead}.")


def _length(name: str, value: Any) -> int:
    """Number of samples that a value has entries for; 1 for a value that all samples share."""
    if isinstance(value, Tensor | np.ndarray):
        # An image is [C, H, W]; embeddings of a text are [N, L, D].
        return value.shape[0] if value.ndim > 0 and (value.ndim != 3 or "embeds" in name) else 1
    if not isinstance(value, list | tuple) or name in SCHEDULES:
        return 1
    one_video = any(part in name for part in VIDEOS) and value and not isinstance(value[0], list | tuple)
    return 1 if one_video else len(value)


def _entry(value: Any, index: int) -> Any:
    """Entry of one sample; of a tensor with its batch dimension."""
    return value[index : index + 1] if isinstance(value, Tensor | np.ndarray) else value[index]


def joined(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the inputs of several samples as the arguments of one call.

    Raises:
        StepquantError: for tensors of different shapes.
    """
    return {name: _joined(name, [row[name] for row in rows]) for name in rows[0]}


def _joined(name: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor | np.ndarray):
        shapes = sorted({tuple(value.shape) for value in values})
        if len(shapes) > 1:
            raise StepquantError(f"input {name} has the shapes {shapes[0]} and {shapes[1]}; expected one shape.")
        return torch.cat(values) if isinstance(first, Tensor) else np.concatenate(values)
    if not isinstance(first, int | float):
        return values
    if any(value != first for value in values):
        raise StepquantError(f"input {name} is {first} and {values[-1]}; expected one value for all samples.")
    return first
