"""Runtimes: what executes the quantized layers of a model. `prepare` installs one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from stepquant.errors import StepquantError
from stepquant.nn.deploy import quantized_modules
from stepquant.nn.layers import Kernel, QuantizedModule
from stepquant.runtime import native, onednn
from stepquant.runtime.onednn import OneDnnKernel
from stepquant.runtime.reference import ReferenceKernel, WeightOnlyKernel

BACKENDS = ("auto", "native", "onednn", "reference")
INTEGER = {"native": native.supported, "onednn": onednn.supported}
"""Runtimes in integers, the fastest first -> why this machine cannot run it, or None."""

KernelFactory = Callable[[QuantizedModule], Kernel | None]
"""A runtime of one's own: the kernel of a layer whose activation is quantized, or None to run it as the reference."""
Backend = str | KernelFactory


def prepare(model: nn.Module, backend: Backend = "auto") -> str:
    """Give every quantized layer of `model` a kernel; returns the name of the backend.

    ``"auto"`` takes the fastest that the machine runs: our own int8 kernels (``native``), else those of oneDNN that
    ship with torch, else the reference. A layer without an integer kernel (its activation is not quantized, or it is
    a grouped convolution) runs as the reference does; `fallbacks` lists those. The model is laid out channels-last,
    which the convolutions want.

    Args:
        backend: one of `BACKENDS`, or a function of your own that gives layers their kernels.

    Raises:
        StepquantError: for an unknown backend, one this machine cannot run, or a function that gives something else.
    """
    if callable(backend):
        native.undo(model)
        for name, module in quantized_modules(model).items():
            module.kernel = _kernel_of(name, module, backend)
        _lay_out(model)
        return getattr(backend, "__name__", type(backend).__name__)
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
    _lay_out(model)
    return backend


def _kernel_of(name: str, module: QuantizedModule, make: KernelFactory) -> Kernel:
    if module.layer_format.activation_bits is None:
        return WeightOnlyKernel(module)
    kernel = make(module)
    if kernel is not None and not isinstance(kernel, Kernel):
        raise StepquantError(f"the runtime gave layer {name} a {type(kernel).__name__}: expected a Kernel, or None.")
    return ReferenceKernel(module) if kernel is None else kernel


def _lay_out(model: nn.Module) -> None:
    for convolution in model.modules():
        if isinstance(convolution, nn.Conv2d):  # not the whole model: a video model has tensors of another rank
            convolution.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fallbacks(model: nn.Module) -> list[str]:
    """Names of the quantized layers that do not run in integers."""
    return [
        name
        for name, module in quantized_modules(model).items()
        if isinstance(module.kernel, (ReferenceKernel, WeightOnlyKernel))
    ]


__all__ = ["BACKENDS", "Backend", "KernelFactory", "fallbacks", "prepare"]
