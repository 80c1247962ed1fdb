"""Facts about a model that only a call of it shows: in which order its modules execute, and what they read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@torch.no_grad()
def execution_order(model: nn.Module, call: Callable[[], Any]) -> list[str]:
    """Return the names of the submodules of `model` in the order in which they first execute.

    Args:
        model: a denoiser, or one block of it.
        call: runs `model`, directly or inside a larger model. It may end early with an exception, which is
            propagated.

    Returns:
        Dotted names without the root's empty one; each name once. A container's name comes before those of its
        members. What the call does not execute is absent.
    """
    order: dict[str, None] = {}
    _call_hooked(model, call, lambda name, _args, _kwargs: order.setdefault(name))
    order.pop("", None)
    return list(order)


@torch.no_grad()
def fed_by_block_input(block: nn.Module, call: Callable[[], Any]) -> list[str]:
    """Return the names of the submodules of `block` that read an input of the block itself, as a shortcut does.

    A view of the input counts; what an operation computes from it does not.

    Args:
        call: as in `execution_order`.
    """
    inputs: list[Tensor] = []  # kept alive, so that no other tensor takes their memory
    found: dict[str, None] = {}

    def read(name: str, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not name:
            inputs.extend(tensors)
        elif {_memory(tensor) for tensor in tensors} & {_memory(tensor) for tensor in inputs}:
            found.setdefault(name)

    _call_hooked(block, call, read)
    return list(found)


def _call_hooked(model: nn.Module, call: Callable[[], Any], before: Callable[[str, Any, Any], Any]) -> None:
    """Run `call` with ``before(name, args, kwargs)`` called ahead of every module of `model`, itself included."""

    def hook(name: str) -> Callable[..., None]:
        def pre_hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            before(name, args, kwargs)

        return pre_hook

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in model.named_modules()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
