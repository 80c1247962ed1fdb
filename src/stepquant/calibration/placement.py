"""Where a denoiser computes while it is calibrated: where it is, or block by block on a device that it need not fit.

Samples and the outputs of blocks stay in the processor's memory. Hooks take a module's arguments to the device where it
computes, so that nothing else has to know. With a device of its own a block's weights come along, and go back when it
has run: the device holds one block of full precision and one under calibration at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

_NAME = "_visit"


def device_of(module: nn.Module) -> torch.device:
    """Where a module's weights are; the processor for a module without."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def moved(values: Any, device: torch.device) -> Any:
    """A tree of arguments with its tensors on `device`."""
    return pytree.tree_map_only(Tensor, lambda x: x.to(device), values)


class _Visit:
    """Hooks of one module; a deep copy of the module has copies of its own.

    Attributes:
        device: where the module computes; None: where its weights are.
        home: where those were when it was placed.
        stays: its weights do not go back.
        rests: the hooks do nothing.
    """

    def __init__(self, device: torch.device | None, home: torch.device) -> None:
        self.device, self.home = device, home
        self.stays = self.rests = False

    def arrive(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.rests:
            return None
        target = self.device or device_of(module)
        module.to(target)  # what was found for its quantizers, too
        return moved(args, target), moved(kwargs, target)

    def leave(self, module: nn.Module, _args: Any, output: Any) -> Any:
        if self.rests or self.stays or self.device is None:
            return None
        self.go(module)
        return moved(output, self.home)

    def go(self, module: nn.Module) -> None:
        """Send a module's weights back."""
        if self.device is not None:
            module.to(self.home)


@contextmanager
def placed(model: nn.Module, blocks: Iterable[str], device: torch.device | None) -> Iterator[None]:
    """`place`, undone in the end."""
    handles = place(model, blocks, device)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            visit = module.__dict__.pop(_NAME, None)
            if visit is not None:
                visit.go(module)


def place(model: nn.Module, blocks: Iterable[str], device: torch.device | None) -> list[RemovableHandle]:
    """Let `model`, and each of its `blocks` alone, be called with tensors from any device; the handles of the hooks.

    Args:
        device: each block computes there, and everything between blocks where `model` is; None: everything does.
    """
    handles: list[RemovableHandle] = []
    if device is None and device_of(model).type == "cpu":
        return handles
    for name in ("", *blocks):
        module = model.get_submodule(name)
        if _NAME not in module.__dict__:
            visit = module.__dict__[_NAME] = _Visit(device if name else None, device_of(module))
            handles.append(module.register_forward_pre_hook(visit.arrive, with_kwargs=True))
            handles.append(module.register_forward_hook(visit.leave))
    return handles


@contextmanager
def staying(*modules: nn.Module) -> Iterator[None]:
    """Keep blocks where they compute, however often they are called, until the context ends."""
    visits = [(module, module.__dict__[_NAME]) for module in modules if _NAME in module.__dict__]
    for module, visit in visits:
        visit.stays = True
        if visit.device is not None:
            module.to(visit.device)
    try:
        yield
    finally:
        for module, visit in visits:
            visit.stays = False
            visit.go(module)


@contextmanager
def resting(*modules: nn.Module) -> Iterator[None]:
    """Leave blocks where they are: something else answers for them."""
    visits = [module.__dict__[_NAME] for module in modules if _NAME in module.__dict__]
    for visit in visits:
        visit.rests = True
    try:
        yield
    finally:
        for visit in visits:
            visit.rests = False
