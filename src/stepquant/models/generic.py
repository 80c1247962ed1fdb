"""Denoisers without a description of their own: their blocks are found by structure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from stepquant.errors import StepquantError
from stepquant.layers.clock import reads_timestep
from stepquant.layers.quantized import can_quantize
from stepquant.models.description import ModelDescription, describe_blocks

TIME_LAYERS = re.compile(r"(^|\.)(time|timestep)_?(embed\w*|proj)\.")
"""Names of the layers of a timestep's own embedding, as diffusers has them."""


def describe_generic(model: nn.Module) -> ModelDescription:
    """Blocks: the members of every list of like modules, and each child of the model outside such lists.

    They come in the order in which the model registers them, which is the order they run in for every denoiser that was
    tried; the `family` says what was found. Nothing is known of skip concatenations, so none is split.

    Raises:
        StepquantError: for a model that reads no timestep, or in which no block is repeated.
    """
    name = type(model).__name__
    if not reads_timestep(model):
        raise StepquantError(f"{name} cannot be quantized step by step: its forward reads no timestep.")
    lists = list(_repeated(model))
    if not lists:
        raise StepquantError(f"{name} is of no known family, and repeats no block that could be found by structure.")
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
    """The outermost lists of two or more modules of one class that hold layers."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        members = list(module) if isinstance(module, nn.ModuleList) else []
        alike = len(members) > 1 and len({type(member) for member in members}) == 1
        if alike and _has_layers(members[0]) and not path.startswith(inside):
            inside = (*inside, f"{path}.")
            yield path, members


def _blocks(model: nn.Module, prefix: str) -> Iterator[str]:
    """Children that hold layers, in order; lists are opened."""
    for name, child in model.named_children():
        if not _has_layers(child):
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _blocks(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _has_layers(module: nn.Module) -> bool:
    return any(can_quantize(submodule) for submodule in module.modules())
