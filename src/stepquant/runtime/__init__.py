"""Runtimes: what executes the quantized layers of a model. `prepare` installs one."""

from __future__ import annotations

import torch
from torch import nn

from stepquant.errors import StepquantError
from stepquant.nn.deploy import quantized_modules
from stepquant.runtime import native, onednn
from stepquant.runtime.onednn import OneDnnKernel
from stepquant.runtime.reference import ReferenceKernel, WeightOnlyKernel

BACKENDS = ("auto", "native", "onednn", "reference")
INTEGER = {"native": native.supported, "onednn": onednn.supported}
"""Runtimes in integers, the fastest first -> why this machine cannot run it, or None."""


def prepare(model: nn.Module, backend: str = "auto") -> str:
    """Give every quantized layer of `model` a kernel; returns the name of the backend.

    ``"auto"`` takes the fastest that the machine runs: our own int8 kernels (``native``), else those of oneDNN that
    ship with torch, else the reference. A layer without an integer kernel (its activation is not quantized, or it is
    a grouped convolution) runs as the reference does; `fallbacks` lists those. The model is laid out channels-last,
    which the convolutions want.

    Raises:
        StepquantError: for an unknown backend, or one this machine cannot run.
    """
    if backend not in BACKENDS:
        raise StepquantError(f"unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}.")
    if backend in INTEGER and (reason := INTEGER[backend]()) is not None:
        raise StepquantError(f"backend {backend} cannot run here: {reason}; use --backend auto.")
    if backend == "auto":
        backend = next((name for name, reason_of in INTEGER.items() if reason_of() is None), "reference")
    native.undo(model)
    for module in quantized_modules(model).values():
        if module.layer_format.activation_bits is None:
            module.kernel = WeightOnlyKernel(module)
        elif backend == "native" and native.can_run(module):
            module.kernel = native.NativeKernel(module)
        elif backend == "onednn" and onednn.can_run(module):
            module.kernel = OneDnnKernel(module)
        else:
            module.kernel = ReferenceKernel(module)
    if backend == "native":
        native.finish(model)
    for convolution in model.modules():
        if isinstance(convolution, nn.Conv2d):  # not the whole model: a video model has tensors of another rank
            convolution.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return backend


def fallbacks(model: nn.Module) -> list[str]:
    """Names of the quantized layers that do not run in integers."""
    return [
        name
        for name, module in quantized_modules(model).items()
        if isinstance(module.kernel, (ReferenceKernel, WeightOnlyKernel))
    ]


__all__ = ["BACKENDS", "fallbacks", "prepare"]
