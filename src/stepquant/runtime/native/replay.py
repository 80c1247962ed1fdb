"""Blocks that run by their recording, wherever nothing has changed since it was made."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from diffusers.models.unets import unet_2d_blocks
from torch import Tensor, nn

from stepquant.layers.clock import StepClock
from stepquant.layers.kernel import opaque
from stepquant.layers.quantized import QuantizedModule
from stepquant.runtime.native.fusion import children_of, is_fused
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
"""Classes of the blocks that are recorded, with all that is in them; and of other fused blocks what they say."""

MOST_LAYOUTS = 8
"""Recordings that a block keeps, of inputs of different shapes."""

SETTINGS = ("s1", "s2", "b1", "b2", "_chunk_size")
"""Attributes by which a user changes what a block of diffusers computes: FreeU, and chunks of a feed-forward."""

_NAME = "_recordings"
_OFF = threading.local()


class _Impossible(Exception):
    """Arguments that a recording cannot be found by."""


class Recordings:
    """What a block remembers, nothing at first; copies of the block begin anew.

    Attributes:
        by_layout: a layout of the arguments -> its recording; True where the block ran once, False where it cannot
            be recorded.
    """

    def __init__(self) -> None:
        self.by_layout: dict[Any, Recording | bool] = {}
        self.clock: StepClock | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Recordings:
        return Recordings()

    def renew(self, block: nn.Module) -> None:
        """Forget every recording, and take the block as it is now."""
        self.by_layout.clear()
        self.children = [
            (modules, name, child, child.__dict__, child.__dict__.get("forward"))
            for modules, name, child in children_of(block)
        ]
        self.parameters = [
            (norm._parameters, name, parameter, parameter.data_ptr())
            for norm in block.modules()
            if isinstance(norm, (nn.GroupNorm, nn.LayerNorm))
            for name, parameter in norm._parameters.items()
            if parameter is not None
        ]
        self.settings = [
            (module.__dict__, name, module.__dict__.get(name))
            for module in block.modules()
            for name in SETTINGS
            if module is block or name in module.__dict__
        ]
        self.clock = next(module.clock for module in block.modules() if isinstance(module, QuantizedModule))

    def hold(self) -> bool:
        """Whether the block is as it was: the same modules, parameters and settings. A few microseconds."""
        if self.clock is None:
            return False
        for modules, name, child, own, forward in self.children:
            if modules.get(name) is not child or own.get("forward") is not forward:
                return False
        for parameters, name, parameter, address in self.parameters:
            if parameters.get(name) is not parameter or parameter.data_ptr() != address:
                return False
        return all(own.get(name) == value for own, name, value in self.settings)

    def hooked(self) -> bool:
        """Whether somebody listens inside of the block, whom a recording would pass over."""
        return any(child._forward_hooks or child._forward_pre_hooks for _, _, child, _, _ in self.children)


def install(model: nn.Module) -> None:
    """Let every block of `model` that has native kernels be recorded."""
    for block in model.modules():
        whole = isinstance(block, RECORDED)
        if (whole or is_fused(block)) and any(is_native(module) for module in block.modules()):
            block.__dict__[_NAME] = Recordings()
        if whole and _NAME in block.__dict__:
            block.forward = MethodType(_forward, block)


def remove(model: nn.Module) -> None:
    """Undo `install`."""
    for block in model.modules():
        if block.__dict__.pop(_NAME, None) is not None and isinstance(block, RECORDED):
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
    return replayed(block, type(block).forward, *args, **kwargs)


def replayed(block: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(block, *args, **kwargs)``, always the same function for one block; by its recording if there is one.

    The first call with arguments of a layout runs as it is, so that kernels make their plans; the second is recorded.
    """
    known: Recordings | None = block.__dict__.get(_NAME)
    if known is None or is_recording() or getattr(_OFF, "value", False):
        return function(block, *args, **kwargs)
    if not known.hold():
        known.renew(block)
    if known.hooked():
        return function(block, *args, **kwargs)
    assert known.clock is not None
    row = known.clock.row
    tensors: list[Tensor] = []
    try:
        layout = (_layout(args, tensors), _layout(kwargs, tensors), torch.get_num_threads())
    except _Impossible:
        return function(block, *args, **kwargs)
    recording = known.by_layout.get(layout)
    if row.dim() > 0 or recording is False:
        return function(block, *args, **kwargs)
    if recording is None:
        if len(known.by_layout) >= MOST_LAYOUTS:
            known.by_layout.clear()
        known.by_layout[layout] = True
        return function(block, *args, **kwargs)
    if recording is True:
        tables = [table for module in block.modules() for table in getattr(module, "by_row", ())]
        lasting = [x for module in block.modules() for x in getattr(module, "lasting", ())]
        lasting += [parameter for _, _, parameter, _ in known.parameters]
        with Recorder(tensors, row, int(row), tables, lasting) as recorder:
            result = function(block, *args, **kwargs)
        known.by_layout[layout] = recorder.finish(result) or False
        return result
    if not recording.lock.acquire(blocking=False):
        return function(block, *args, **kwargs)
    try:
        return recording.replay(tensors, int(row))
    finally:
        recording.lock.release()


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
