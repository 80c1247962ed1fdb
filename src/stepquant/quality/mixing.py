"""Parts of a quantization: its layers and attention operands, taken from another one, or left in floating point."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from dataclasses import replace
from itertools import takewhile
from typing import Any

from torch import nn

from stepquant.calibration.model import projection_of
from stepquant.core.dynamic import DynamicGrid
from stepquant.core.qtensor import QuantizedAttention
from stepquant.layers.format import OPERANDS
from stepquant.layers.install import Quantization

INSIDE = r"(\.|$)"
"""Ends the regular expression of a module and everything inside it."""


def mixed(
    base: Quantization, other: Quantization | None, chosen: Callable[[str], bool], model: nn.Module
) -> Quantization:
    """`base` with the chosen parts from `other`; None leaves them in floating point.

    A part is a layer with its input, or an operand of an attention, which goes with the layer that computes it, as the
    overrides of a spec have it. Both have per-step tables of the same timesteps, or `other` has static ones.

    Args:
        chosen: whether the part of a layer, or of an attention's module, is taken from `other`.
        model: the full-precision denoiser.
    """
    theirs = {} if other is None else other.layers
    layers = {name: layer for name, layer in base.layers.items() if not chosen(name)}
    layers |= {name: layer for name, layer in theirs.items() if chosen(name)}
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    attentions = {}
    for name in base.attentions.keys() | ({} if other is None else other.attentions).keys():
        operands = {}
        for operand in OPERANDS:
            source = other if chosen(projection_of(model, name, operand)) else base
            attention = None if source is None else source.attentions.get(name)
            operands[operand] = None if attention is None else getattr(attention, operand)
        if any(grid is not None for grid in operands.values()):
            attentions[name] = QuantizedAttention(**operands)
    return replace(
        base,
        layers={name: layers[name] for name in sorted(layers, key=lambda name: order[name])},
        attentions={name: attentions[name] for name in sorted(attentions)},
        correction=None,  # it was estimated for other layers
    )


def with_dynamic_activations(quantization: Quantization) -> Quantization:
    """The same weights with activations of as many bits whose range is found while they are quantized."""

    def dynamic(grid: Any) -> DynamicGrid | None:
        return None if grid is None else DynamicGrid(grid.bits, row_bits=grid.row_bits)

    layers = {name: replace(layer, input=dynamic(layer.input)) for name, layer in quantization.layers.items()}
    attentions = {
        name: QuantizedAttention(**{operand: dynamic(getattr(attention, operand)) for operand in OPERANDS})
        for name, attention in quantization.attentions.items()
    }
    return replace(quantization, layers=layers, attentions=attentions, correction=None)


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Group the names of layers by the first part of the path in which they differ, with its number.

    ``down_blocks.0.resnets.1.conv1`` belongs to ``down_blocks.0``; among the layers of ``down_blocks.0`` alone it
    belongs to ``down_blocks.0.resnets.1``. A single layer is a group.
    """
    names = list(names)
    paths = [name.split(".") for name in names]
    first, last = min(paths), max(paths)
    alike = (a == b for a, b in zip(first, last, strict=False))
    shared = len(list(takewhile(bool, alike))) if len(paths) > 1 else len(first) - 1
    groups: dict[str, list[str]] = {}
    for name, path in zip(names, paths, strict=True):
        numbered = len(path) > shared + 1 and path[shared + 1].isdigit()
        groups.setdefault(".".join(path[: shared + 1 + numbered]), []).append(name)
    return {(members[0] if len(members) == 1 else part): members for part, members in groups.items()}


def inside(parts: Iterable[str]) -> Callable[[str], bool]:
    """Whether a name is one of `parts`, or inside one."""
    prefixes = tuple(parts)
    return lambda name: any(name == part or name.startswith(f"{part}.") for part in prefixes)


def overrides_of(parts: Iterable[str], layers: Container[str], bits: str) -> dict[str, str]:
    """Overrides of a spec that give these layers, and the layers inside these modules, other bits."""
    return {f"^{re.escape(part)}{'$' if part in layers else INSIDE}": bits for part in parts}
