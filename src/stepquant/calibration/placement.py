"""Where a denoiser computes while it is calibrated: in place, or block by block on a device too small for all of it.

Samples and the outputs of blocks stay in CPU memory. Hooks move a module's arguments to the device where it computes,
so that no other code has to know. With a separate device a block's weights are moved there for the call and back
afterwards: the device holds one full-precision block and one block under calibration at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from stepquant.errors import StepquantError, first_line
from stepquant.layers.forwards import replaced_forwards

_NAME = "_placement"


def device_of(module: nn.Module) -> torch.device:
    """Device of a module's weights; the CPU for a module without weights."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def check_device(device: torch.device | str | None) -> torch.device | None:
    """The requested device, with its number; raises `StepquantError` if there is none of that name here."""
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise StepquantError(
            f"device is {str(device)!r}, which is not available ({first_line(error)}); expected a device of torch. "
            "Leave it out to compute where the pipeline is."
        ) from None
    return found


def moved(values: Any, device: torch.device) -> Any:
    """A tree of arguments with its tensors on `device`."""
    return pytree.tree_map_only(Tensor, lambda x: x.to(device), values)


class _Placement:
    """Hooks of one module; a deep copy of the module has its own.

    Attributes:
        device: where the module computes; None for where its weights are.
        home: where its weights were at first.
        stays: whether its weights remain on `device` after a call.
        disabled: whether the hooks do nothing.
    """

    def __init__(self, device: torch.device | None, home: torch.device) -> None:
        self.device, self.home = device, home
        self.stays = self.disabled = False

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.disabled:
            return None
        target = self.device or device_of(module)
        module.to(target)  # the grids of its quantizers, too
        return moved(args, target), moved(kwargs, target)

    def after(self, module: nn.Module, _args: Any, output: Any) -> Any:
        if self.disabled or self.stays or self.device is None:
            return None
        self.send_home(module)
        return moved(output, self.home)

    def send_home(self, module: nn.Module) -> None:
        """Move a module's weights back."""
        if self.device is not None:
            module.to(self.home)


@contextmanager
def placed(model: nn.Module, blocks: Iterable[str], device: torch.device | None) -> Iterator[None]:
    """`place` for the duration of the context."""
    handles = place(model, blocks, device)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            placement = module.__dict__.pop(_NAME, None)
            if placement is not None:
                placement.send_home(module)


def place(model: nn.Module, blocks: Iterable[str], device: torch.device | None) -> list[RemovableHandle]:
    """Allow calls of `model` and of each of its `blocks` with tensors on any device.

    Args:
        device: each block computes there, everything else where `model` is; None: everything computes where it is.

    Returns:
        The handles of the hooks.
    """
    handles: list[RemovableHandle] = []
    if device is None and device_of(model).type == "cpu":
        return handles
    for name in ("", *blocks):
        module = model.get_submodule(name)
        if _NAME not in module.__dict__:
            placement = module.__dict__[_NAME] = _Placement(device if name else None, device_of(module))
            handles.append(module.register_forward_pre_hook(placement.before, with_kwargs=True))
            handles.append(module.register_forward_hook(placement.after))
    return handles


@contextmanager
def staying(*modules: nn.Module) -> Iterator[None]:
    """Keep blocks on the device where they compute, between calls, for the duration of the context."""
    placements = _placements(modules)
    for module, placement in placements:
        placement.stays = True
        if placement.device is not None:
            module.to(placement.device)
    try:
        yield
    finally:
        for module, placement in placements:
            placement.stays = False
            placement.send_home(module)


@contextmanager
def answering(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of modules for the duration of the context; their weights are not moved."""
    placements = _placements(forwards)
    for _, placement in placements:
        placement.disabled = True
    try:
        with replaced_forwards(forwards):
            yield
    finally:
        for _, placement in placements:
            placement.disabled = False


def _placements(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, _Placement]]:
    return [(module, module.__dict__[_NAME]) for module in modules if _NAME in module.__dict__]
