"""Run blocks by their recordings, as long as nothing has changed since those were made."""

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
"""Classes whose whole forward pass is recorded. Other fused blocks call `replayed` for the part that can be."""

MOST_LAYOUTS = 8
"""Recordings that a block keeps, for inputs of different layouts."""

SETTINGS = ("s1", "s2", "b1", "b2", "_chunk_size")
"""Attributes that change what a block of diffusers computes: FreeU, and chunks of a feed-forward."""

_NAME = "_recordings"
_OFF = threading.local()


class _Impossible(Exception):
    """An argument that cannot be part of a layout."""


class Recordings:
    """The recordings of a block, empty at first and in copies of the block.

    Attributes:
        by_layout: layout of the arguments -> the recording; True after the first run, False if it cannot be recorded.
    """

    def __init__(self) -> None:
        self.by_layout: dict[Any, Recording | bool] = {}
        self.clock: StepClock | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Recordings:
        return Recordings()

    def renew(self, block: nn.Module) -> None:
        """Delete all recordings and remember the current state of the block."""
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
        """Whether modules, parameters and settings are unchanged; takes a few microseconds."""
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
        """Whether a module inside the block has hooks, which a recording would not call."""
        return any(child._forward_hooks or child._forward_pre_hooks for _, _, child, _, _ in self.children)


def install(model: nn.Module) -> None:
    """Record every block of `model` that has native kernels, from its second call on."""
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
    """Run the blocks kernel by kernel in this thread, without recordings."""
    _OFF.value = True
    try:
        yield
    finally:
        _OFF.value = False


@opaque
def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return replayed(block, type(block).forward, *args, **kwargs)


def replayed(block: nn.Module, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(block, *args, **kwargs)``, by a recording if there is one; a block is always given the same function.

    The first call with a layout of arguments runs normally, so that kernels make their plans; the second is recorded.
    """
    recordings: Recordings | None = block.__dict__.get(_NAME)
    if recordings is None or is_recording() or getattr(_OFF, "value", False):
        return function(block, *args, **kwargs)
    if not recordings.hold():
        recordings.renew(block)
    if recordings.hooked():
        return function(block, *args, **kwargs)
    assert recordings.clock is not None
    row = recordings.clock.row
    tensors: list[Tensor] = []
    try:
        layout = (_layout(args, tensors), _layout(kwargs, tensors), torch.get_num_threads())
    except _Impossible:
        return function(block, *args, **kwargs)
    recording = recordings.by_layout.get(layout)
    if row.dim() > 0 or recording is False:
        return function(block, *args, **kwargs)
    if recording is None:
        if len(recordings.by_layout) >= MOST_LAYOUTS:
            recordings.by_layout.clear()
        recordings.by_layout[layout] = True
        return function(block, *args, **kwargs)
    if recording is True:
        tables = [table for module in block.modules() for table in getattr(module, "by_row", ())]
        lasting = [x for module in block.modules() for x in getattr(module, "lasting", ())]
        lasting += [parameter for _, _, parameter, _ in recordings.parameters]
        with Recorder(tensors, row, int(row), tables, lasting) as recorder:
            result = function(block, *args, **kwargs)
        recordings.by_layout[layout] = recorder.finish(result) or False
        return result
    if not recording.lock.acquire(blocking=False):
        return function(block, *args, **kwargs)
    try:
        return recording.replay(tensors, int(row))
    finally:
        recording.lock.release()


def _layout(value: Any, tensors: list[Tensor]) -> Any:
    """A hashable layout, equal for arguments that one recording serves; appends their tensors to `tensors`."""
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
