"""Replace the `forward` of a block, for as long as its modules stay the same."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from stepquant.layers.kernel import Kernel
from stepquant.runtime.native.norms import is_present

_LAYERS = "_fused_layers"


def replace_forward(block: nn.Module, forward: Callable[..., Any]) -> None:
    """Make ``block(...)`` call ``forward(block, ...)``, and remember every module inside the block."""
    children = children_of(block)
    # In the block's dictionary, so that a copy of the model remembers the modules of the copy.
    block.__dict__[_LAYERS] = children, [child for _, _, child in children if _has_parameters(child)]
    block.forward = MethodType(forward, block)


def children_of(block: nn.Module) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """Every module inside a block, with the dictionary that holds it and its name there."""
    return [
        (parent._modules, name, child)
        for parent in block.modules()
        for name, child in parent._modules.items()
        if child is not None
    ]


def restore_forward(block: nn.Module) -> None:
    """Undo `replace_forward`, if it was called."""
    if block.__dict__.pop(_LAYERS, None) is not None:
        del block.forward


def is_fused(block: nn.Module) -> bool:
    """Whether the `forward` of a block is replaced."""
    return _LAYERS in block.__dict__


def is_unchanged(block: nn.Module) -> bool:
    """Whether every module inside the block is still in its place, and norms have their parameters.

    False after an adapter wrapped a layer or an attention processor was replaced. Called in every forward pass, so it
    takes a few microseconds.
    """
    children, norms = block.__dict__[_LAYERS]
    for modules, name, child in children:
        present = modules.get(name)
        # A kernel that was renewed, for weights that were loaded since, does as well.
        if present is not child and not (isinstance(child, Kernel) and type(present) is type(child)):
            return False
    return all(is_present(norm) for norm in norms)


def _has_parameters(module: nn.Module) -> bool:
    return isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and module.weight is not None
