"""Give a block another `forward` while its layers are those that it was made for."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from stepquant.layers.kernel import Kernel
from stepquant.runtime.native.norms import is_present

_LAYERS = "_fused_layers"


def replace_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    """Let ``block(...)`` call ``forward(block, ...)``, and remember every module inside the block."""
    children = children_of(block)
    # In the block's own dictionary, so that a copy of the model remembers the copy's modules.
    block.__dict__[_LAYERS] = children, [child for _, _, child in children if _has_parameters(child)]
    block.forward = MethodType(forward, block)


def children_of(block: nn.Module) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """Every module inside a block, with the dictionary that it stands in and its name there."""
    return [
        (parent._modules, name, child)
        for parent in block.modules()
        for name, child in parent._modules.items()
        if child is not None
    ]


def restore_forward(block: nn.Module) -> None:
    """Undo `replace_forward`, if it was done."""
    if block.__dict__.pop(_LAYERS, None) is not None:
        del block.forward


def is_fused(block: nn.Module) -> bool:
    """Whether a block has another `forward`."""
    return _LAYERS in block.__dict__


def is_unchanged(block: nn.Module) -> bool:
    """Whether every module inside the block stands where it stood, and norms have their parameters at hand.

    It is not where an adapter was put beside a layer since, or a processor exchanged. Looked at in every call, so in a
    few microseconds.
    """
    children, norms = block.__dict__[_LAYERS]
    for modules, name, child in children:
        present = modules.get(name)
        # A kernel made anew, of weights loaded since, is as good.
        if present is not child and not (isinstance(child, Kernel) and type(present) is type(child)):
            return False
    return all(is_present(norm) for norm in norms)


def _has_parameters(module: nn.Module) -> bool:
    return isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and module.weight is not None
