"""Runtimes: what executes the quantized layers of a model. `prepare` installs one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.errors import StepquantError
from stepquant.nn.deploy import quantized_modules
from stepquant.nn.layers import Kernel, QuantizedModule
from stepquant.runtime import native, onednn
from stepquant.runtime.onednn import OneDnnKernel
from stepquant.runtime.reference import ReferenceKernel, WeightOnlyKernel

BACKENDS = ("auto", "native", "onednn", "reference")
INTEGER = {"native": native.supported, "onednn": onednn.supported}
"""Runtimes in integers, the fastest first -> why this machine cannot run it, or None."""

MEMORY = ("unpacked", "packed")
"""How weights of up to 4 bits are held: a byte each, or two to a byte, unpacked piece by piece as they are used."""

KernelFactory = Callable[[QuantizedModule], Kernel | None]
"""A runtime of one's own: the kernel of a layer whose activation is quantized, or None to run it as the reference."""
Backend = str | KernelFactory


def prepare(model: nn.Module, backend: Backend = "auto", memory: str = "unpacked") -> str:
    """Give every quantized layer of `model` a kernel; returns the name of the backend.

    ``"auto"`` takes the fastest that the machine runs: our own int8 kernels (``native``), else those of oneDNN that
    ship with torch, else the reference. A layer without an integer kernel (its activation is not quantized, or it is
    a grouped convolution) runs as the reference does; `fallbacks` lists those. The model is laid out channels-last,
    which the convolutions want.

    Args:
        backend: one of `BACKENDS`, or a function of your own that gives layers their kernels.
        memory: one of `MEMORY`. Results are the same; packed, the native runtime takes a little longer, and layers that
            run in another one much longer, since they are made ready for each call.

    Raises:
        StepquantError: for an unknown backend, one this machine cannot run, a function that gives something else, or an
            unknown kind of memory.
    """
    check_memory(memory)
    if callable(backend):
        if memory != "unpacked":
            raise StepquantError("a runtime of your own holds weights as it likes: leave memory out.")
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
    packed = memory == "packed"
    for module in quantized_modules(model).values():
        make = _kernel_class(module, backend)
        if make is native.NativeKernel:
            native.install(module, packed=packed)
        else:
            module.kernel = PassingKernel(module, make) if packed else make(module)
    if backend == "native":
        native.finish(model)
    _lay_out(model)
    return backend


def check_memory(memory: str) -> None:
    """Raise `StepquantError` unless `memory` is one of `MEMORY`."""
    if memory not in MEMORY:
        raise StepquantError(f"memory is {memory!r}: expected {' or '.join(MEMORY)}.")


def _kernel_class(module: QuantizedModule, backend: str) -> type[Kernel]:
    if module.layer_format.activation_bits is None:
        return WeightOnlyKernel
    if backend == "native" and native.can_run(module):
        return native.NativeKernel
    if backend == "onednn" and onednn.can_run(module):
        return OneDnnKernel
    return ReferenceKernel


class PassingKernel(Kernel):
    """A kernel that is made for each call and forgotten, so that only the codes stay in memory."""

    def __init__(self, module: QuantizedModule, make: type[Kernel]) -> None:
        super().__init__()
        self.layer, self.make = (module,), make  # in a tuple: a kernel is part of its layer, not the other way round

    def __deepcopy__(self, memo: dict[int, Any]) -> PassingKernel:
        return PassingKernel(copy.deepcopy(self.layer[0], memo), self.make)

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        y: Tensor = self.make(self.layer[0])(x, row)
        return y


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
    names = []
    for name, module in quantized_modules(model).items():
        kernel = module.kernel.make if isinstance(module.kernel, PassingKernel) else type(module.kernel)
        if issubclass(kernel, (ReferenceKernel, WeightOnlyKernel)):
            names.append(name)
    return names


__all__ = ["BACKENDS", "MEMORY", "Backend", "KernelFactory", "check_memory", "fallbacks", "prepare"]
