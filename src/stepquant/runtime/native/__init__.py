"""The native runtime: int8 kernels in C++ (``source/``) for the CPU, compiled once by the machine's compiler."""

from __future__ import annotations

from torch import nn

from stepquant.layers.interception import quantized_attentions
from stepquant.layers.quantized import quantized_modules
from stepquant.runtime.native import attention, blocks, replay
from stepquant.runtime.native.build import supported
from stepquant.runtime.native.kernel import NativeKernel


def finish(model: nn.Module) -> None:
    """Install integer attention, fusion and recordings, after every layer of `model` has its kernel."""
    for processor in quantized_attentions(model).values():
        if attention.NativeAttention.supports(processor):
            processor.kernel = attention.NativeAttention(processor)
    blocks.fuse(model)
    replay.install(model)


def undo(model: nn.Module) -> None:
    """Undo `finish` and give layers their codes back, before another runtime is installed."""
    for module in quantized_modules(model).values():
        module.restore()
    replay.remove(model)
    blocks.separate(model)
    for processor in quantized_attentions(model).values():
        processor.kernel = None


__all__ = ["NativeKernel", "finish", "supported", "undo"]
