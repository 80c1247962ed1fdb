"""Denoisers of unknown families: their blocks are found by structure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from stepquant.errors import StepquantError
from stepquant.layers.clock import timestep_name
from stepquant.layers.quantized import can_quantize
from stepquant.models.description import ModelDescription, describe_blocks, has_layers

TIME_LAYERS = re.compile(r"(^|\.)(time|timestep)_?(embed\w*|proj)\.")
"""Names of the layers of the timestep embedding in diffusers."""


def describe_generic(model: nn.Module) -> ModelDescription:
    """Blocks: the members of each list of modules of one class, and each child of the model outside of such lists.

    Blocks are in registration order, which was the execution order in all denoisers that were tried. The `family` lists
    what was found. Skip concatenations are unknown, so none is split.

    Raises:
        StepquantError: if the model reads no timestep, or repeats no block.
    """
    name = type(model).__name__
    if timestep_name(model) is None:
        raise StepquantError(f"{name} has no timestep; expected a denoiser whose forward has a parameter `timestep`.")
    lists = list(_repeated(model))
    if not lists:
        raise StepquantError(
            f"{name} is not of a known family and repeats no block; expected a known family, or a list of modules "
            "of one class."
        )
    blocks = list(_blocks(model, ""))
    layers = [layer for layer, module in model.named_modules() if can_quantize(module)]
    found = ", ".join(f"{len(members)} {type(members[0]).__name__} in {path}" for path, members in lists)
    _, longest = max(lists, key=lambda entry: len(entry[1]))
    paths = {id(module): path for path, module in model.named_modules()}
    return describe_blocks(
        model,
        f"{name} (by structure: {found})",
        blocks,
        first=next((layer for layer in layers if not TIME_LAYERS.search(layer)), layers[0]),
        last=layers[-1],
        time_layers=[layer for layer in layers if TIME_LAYERS.search(f"{layer}.")],
        middle=paths[id(longest[len(longest) // 2])],
    )


def _repeated(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Yield the outermost lists of two or more modules of one class that contain layers."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        members = list(module) if isinstance(module, nn.ModuleList) else []
        same_type = len(members) > 1 and len({type(member) for member in members}) == 1
        if same_type and has_layers(members[0]) and not path.startswith(inside):
            inside = (*inside, f"{path}.")
            yield path, members


def _blocks(model: nn.Module, prefix: str) -> Iterator[str]:
    """Yield the children that contain layers, in registration order; of lists, their members."""
    for name, child in model.named_children():
        if not has_layers(child):
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _blocks(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
