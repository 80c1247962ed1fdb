"""Blocks of a UNet that run by their recording, wherever nothing has changed since it was made."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from diffusers.models.unets import unet_2d_blocks
from torch import Tensor, nn

from stepquant.nn.layers import QuantizedModule, opaque
from stepquant.runtime.native.kernel import is_native
from stepquant.runtime.native.library import TYPES
from stepquant.runtime.native.recording import Recorder, Recording, is_recording

RECORDED = (
    unet_2d_blocks.DownBlock2D,
    unet_2d_blocks.AttnDownBlock2D,
    unet_2d_blocks.CrossAttnDownBlock2D,
    unet_2d_blocks.UNetMidBlock2D,
    unet_2d_blocks.UNetMidBlock2DCrossAttn,
    unet_2d_blocks.UpBlock2D,
    unet_2d_blocks.AttnUpBlock2D,
    unet_2d_blocks.CrossAttnUpBlock2D,
)
"""Classes of the blocks that are recorded, with all that is in them."""

MOST_LAYOUTS = 8
"""Recordings that a block keeps, of inputs of different shapes."""

SETTINGS = ("s1", "s2", "b1", "b2", "_chunk_size", "training")
"""Attributes by which a user changes what a block of diffusers computes: FreeU, chunks of a feed-forward, dropout."""

_NAME = "_recordings"
_OFF = threading.local()


class _Impossible(Exception):
    """Arguments that a recording cannot be found by."""


class Recordings:
    """What a block remembers; copies of the block begin anew.

    Attributes:
        forward: what the block ran before.
        by_layout: a layout of the arguments -> its recording; True where the block ran once, False where it cannot
            be recorded.
    """

    def __init__(self, block: nn.Module, forward: Any) -> None:
        self.forward = forward
        self.by_layout: dict[Any, Recording | bool] = {}
        self.renew(block)

    def __deepcopy__(self, memo: dict[int, Any]) -> Recordings:
        copied = Recordings.__new__(Recordings)
        memo[id(self)] = copied
        copied.forward, copied.by_layout, copied.children = self.forward, {}, []
        copied.parameters, copied.settings, copied.clock = [], [], None
        return copied

    def renew(self, block: nn.Module) -> None:
        """Forget every recording, and take the block as it is now."""
        self.by_layout.clear()
        self.children = [
            (parent._modules, name, child, child.__dict__, child.__dict__.get("forward"))
            for parent in block.modules()
            for name, child in parent._modules.items()
            if child is not None
        ]
        self.parameters = [
            (norm._parameters, name, parameter, parameter.data_ptr())
            for norm in block.modules()
            if isinstance(norm, (nn.GroupNorm, nn.LayerNorm))
            for name, parameter in norm._parameters.items()
            if parameter is not None
        ]
        self.settings = [
            (module.__dict__, name, module.__dict__[name])
            for module in block.modules()
            for name in SETTINGS
            if name in module.__dict__
        ]
        self.clock = next(module.clock for module in block.modules() if isinstance(module, QuantizedModule))

    def hold(self) -> bool:
        """Whether the block is as it was: the same modules, parameters and settings. A few microseconds."""
        for modules, name, child, own, forward in self.children:
            if modules.get(name) is not child or own.get("forward") is not forward:
                return False
        for parameters, name, parameter, address in self.parameters:
            if parameters.get(name) is not parameter or parameter.data_ptr() != address:
                return False
        return all(own.get(name) == value for own, name, value in self.settings) and self.clock is not None

    def hooked(self) -> bool:
        """Whether somebody listens inside of the block, which a recording would pass over."""
        return any(child._forward_hooks or child._forward_pre_hooks for _, _, child, _, _ in self.children)


def install(model: nn.Module) -> None:
    """Let every block of `model` that has native kernels be recorded."""
    for block in model.modules():
        if isinstance(block, RECORDED) and any(is_native(module) for module in block.modules()):
            block.__dict__[_NAME] = Recordings(block, type(block).forward)
            block.forward = MethodType(_forward, block)


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    for block in model.modules():
        if block.__dict__.pop(_NAME, None) is not None:
            del block.forward


@contextmanager
def step_by_step() -> Iterator[None]:
    """Run this thread's blocks kernel by kernel, as if they had no recording."""
    _OFF.value = True
    try:
        yield
    finally:
        _OFF.value = False


@opaque
def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    known: Recordings = block.__dict__[_NAME]
    if is_recording() or getattr(_OFF, "value", False) or known.hooked():
        return known.forward(block, *args, **kwargs)
    if not known.hold():
        known.renew(block)
    row = known.clock.row
    tensors: list[Tensor] = []
    try:
        layout = (_layout(args, tensors), _layout(kwargs, tensors), torch.get_num_threads())
    except _Impossible:
        return known.forward(block, *args, **kwargs)
    recording = known.by_layout.get(layout)
    if row.dim() == 0 and isinstance(recording, Recording) and recording.lock.acquire(blocking=False):
        try:
            return recording.replay(tensors, int(row))
        finally:
            recording.lock.release()
    if row.dim() > 0 or recording is not True:
        if recording is None:
            if len(known.by_layout) >= MOST_LAYOUTS:
                known.by_layout.clear()
            known.by_layout[layout] = True  # kernels make their plans in the first run
        return known.forward(block, *args, **kwargs)
    tables = [table for module in block.modules() for table in getattr(module, "by_row", ())]
    with Recorder(tensors, row, int(row), tables) as recorder:
        result = known.forward(block, *args, **kwargs)
    known.by_layout[layout] = recorder.finish(result) or False
    return result


def _layout(value: Any, tensors: list[Tensor]) -> Any:
    """Equal for arguments that a block treats alike; the tensors among them are appended to `tensors`."""
    if type(value) in (Tensor, nn.Parameter):
        if value.device.type != "cpu" or value.dtype not in TYPES:
            raise _Impossible
        tensors.append(value)
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple([_layout(part, tensors) for part in value])
    if isinstance(value, dict):
        return tuple([(name, _layout(part, tensors)) for name, part in value.items()])
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    raise _Impossible
