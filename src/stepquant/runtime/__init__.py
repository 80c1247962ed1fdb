"""Runtimes: what executes the quantized layers of a model. `prepare` installs one."""

from __future__ import annotations

import torch
from torch import nn

from stepquant.errors import StepquantError
from stepquant.nn.deploy import quantized_modules
from stepquant.runtime import onednn
from stepquant.runtime.onednn import OneDnnKernel
from stepquant.runtime.reference import ReferenceKernel, WeightOnlyKernel

BACKENDS = ("auto", "onednn", "reference")


def prepare(model: nn.Module, backend: str = "auto") -> str:
    """Give every quantized layer of `model` a kernel; returns the name of the backend.

    ``"auto"`` takes oneDNN's int8 kernels where the machine runs them, else the reference. A layer without an integer
    kernel (its activation is not quantized, or it is a grouped convolution) runs as the reference does; `fallbacks`
    lists those. The model is laid out channels-last, which the convolutions want.

    Raises:
        StepquantError: for an unknown backend, or one this machine cannot run.
    """
    if backend not in BACKENDS:
        raise StepquantError(f"unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}.")
    reason = onednn.supported()
    if backend == "onednn" and reason is not None:
        raise StepquantError(f"backend onednn cannot run here: {reason}; use --backend reference.")
    chosen = ("onednn" if reason is None else "reference") if backend == "auto" else backend
    for module in quantized_modules(model).values():
        if module.layer_format.activation_bits is None:
            module.kernel = WeightOnlyKernel(module)
        elif chosen == "onednn" and onednn.can_run(module):
            module.kernel = OneDnnKernel(module)
        else:
            module.kernel = ReferenceKernel(module)
    for convolution in model.modules():
        if isinstance(convolution, nn.Conv2d):  # not the whole model: a video model has tensors of another rank
            convolution.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return chosen


def fallbacks(model: nn.Module) -> list[str]:
    """Names of the quantized layers that do not run in integers."""
    return [name for name, module in quantized_modules(model).items() if not isinstance(module.kernel, OneDnnKernel)]


__all__ = ["BACKENDS", "fallbacks", "prepare"]
