"""Runtimes: what executes the quantized layers of a model. `prepare` installs one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.errors import StepquantError
from stepquant.nn.deploy import quantized_modules
from stepquant.nn.layers import Kernel, QuantizedModule
from stepquant.runtime import cuda, native, onednn
from stepquant.runtime.cuda import CudaKernel
from stepquant.runtime.native import blocks
from stepquant.runtime.onednn import OneDnnKernel
from stepquant.runtime.reference import ReferenceKernel, WeightOnlyKernel

BACKENDS = ("auto", "native", "onednn", "cuda", "reference")
INTEGER = {"native": native.supported, "onednn": onednn.supported, "cuda": cuda.supported}
"""Runtimes in integers, the fastest first -> why this machine cannot run it, or None."""
DEVICE = {"native": "cpu", "onednn": "cpu", "cuda": "cuda"}
"""The kind of device that a runtime in integers is for."""

MEMORY = ("unpacked", "packed")
"""How weights of up to 4 bits are held: a byte each, or two to a byte, unpacked piece by piece as they are used."""

KernelFactory = Callable[[QuantizedModule], Kernel | None]
"""A runtime of one's own: the kernel of a layer whose activation is quantized, or None to run it as the reference."""
Backend = str | KernelFactory


def prepare(model: nn.Module, backend: Backend = "auto", memory: str = "unpacked") -> str:
    """Give every quantized layer of `model` a kernel; returns the name of the backend.

    ``"auto"`` takes the fastest that runs on the device the model lies on: on a processor our own int8 kernels
    (``native``), else those of oneDNN that ship with torch; on a GPU Triton's (``cuda``); else the reference. A model
    that is moved to another device later gets what `backend` means there, and the reference where that has no kernels.
    A layer without an integer kernel (its activation is not quantized, or it is a grouped convolution) runs as the
    reference does; `fallbacks` lists those. The model is laid out channels-last, which the convolutions want.

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
        name = getattr(backend, "__name__", type(backend).__name__)
    else:
        if backend not in BACKENDS:
            raise StepquantError(f"unknown backend {backend!r}: expected one of {', '.join(BACKENDS)}.")
        if backend in INTEGER and (reason := INTEGER[backend]()) is not None:
            raise StepquantError(f"backend {backend} cannot run here: {reason}; use --backend auto.")
        name = _resolve(backend, _device_of(model))
    native.undo(model)
    for layer_name, module in quantized_modules(model).items():
        if callable(backend):
            module.use(partial(_own_kernel, layer_name, backend))
        else:
            module.use(partial(_kernel, backend, memory == "packed"))
    if name == "native":
        native.finish(model)
    elif name == "cuda":
        blocks.fuse(model)
    _lay_out(model)
    return name


def check_memory(memory: str) -> None:
    """Raise `StepquantError` unless `memory` is one of `MEMORY`."""
    if memory not in MEMORY:
        raise StepquantError(f"memory is {memory!r}: expected {' or '.join(MEMORY)}.")


def _device_of(model: nn.Module) -> torch.device:
    return next((module.device for module in quantized_modules(model).values()), torch.device("cpu"))


def _resolve(backend: str, device: torch.device) -> str:
    """What ``"auto"`` means on a device; any other backend is what it is."""
    if backend != "auto":
        return backend
    candidates = (name for name, kind in DEVICE.items() if kind == device.type)
    return next((name for name in candidates if INTEGER[name]() is None), "reference")


def _kernel(backend: str, packed: bool, module: QuantizedModule) -> Kernel:
    """The kernel that `backend` has for a layer on the device it is on."""
    make = _kernel_class(module, _resolve(backend, module.device))
    if make is native.NativeKernel or make is CudaKernel:
        kernel: Any = native.NativeKernel(module, packed=packed) if make is native.NativeKernel else make(module)
        module.release(kernel.integers)  # from now on the kernel holds the weight alone
        return kernel
    return PassingKernel(module, make) if packed else make(module)


def _kernel_class(module: QuantizedModule, backend: str) -> type[Kernel]:
    device = module.device.type
    if module.layer_format.activation_bits is None:
        return WeightOnlyKernel
    if backend == "native" and device == "cpu" and native.can_run(module):
        return native.NativeKernel
    if backend == "onednn" and device == "cpu" and onednn.can_run(module):
        return OneDnnKernel
    if backend == "cuda" and (device == "cuda" or cuda.interpreted()) and cuda.can_run(module):
        return CudaKernel
    return ReferenceKernel


class PassingKernel(Kernel):
    """A kernel that is made for each call and forgotten, so that only the codes stay in memory."""

    def __init__(self, module: QuantizedModule, make: type[Kernel]) -> None:
        super().__init__()
        self.layer, self.make = (module,), make  # in a tuple: a kernel is part of its layer, not the other way round

    def __deepcopy__(self, memo: dict[int, Any]) -> PassingKernel:
        return PassingKernel(copy.deepcopy(self.layer[0], memo), self.make)

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        module = self.layer[0]
        y: Tensor = self.make(module).to(module.device)(x, row)
        return y


def _own_kernel(name: str, make: KernelFactory, module: QuantizedModule) -> Kernel:
    """The kernel that a runtime of one's own has for layer `name`."""
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
