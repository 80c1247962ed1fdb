"""Runtimes: what executes the quantized layers of a model. `prepare` installs one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.core.dynamic import DynamicFormat
from stepquant.errors import StepquantError
from stepquant.layers.attention import QuantizedAttentionProcessor
from stepquant.layers.format import OPERANDS
from stepquant.layers.interception import quantized_attentions
from stepquant.layers.kernel import Kernel
from stepquant.layers.quantized import QuantizedModule, quantized_modules
from stepquant.runtime import cuda, native, onednn
from stepquant.runtime.cuda import CudaKernel
from stepquant.runtime.native import blocks
from stepquant.runtime.onednn import OneDnnKernel
from stepquant.runtime.reference import DynamicKernel, ReferenceKernel, WeightOnlyKernel
from stepquant.user_code import load_function

BACKENDS = ("auto", "native", "onednn", "cuda", "reference")
INTEGER = {"native": native.supported, "onednn": onednn.supported, "cuda": cuda.supported}
"""Integer runtimes, fastest first -> function that returns why this machine cannot run it, or None."""
DEVICE = {"native": "cpu", "onednn": "cpu", "cuda": "cuda"}
"""Device type of each integer runtime."""

KERNELS: dict[str, type[Kernel]] = {"native": native.NativeKernel, "onednn": OneDnnKernel, "cuda": CudaKernel}
NAMES: dict[type[Kernel], str] = {
    **{kernel: name for name, kernel in KERNELS.items()},
    ReferenceKernel: "reference",
    DynamicKernel: "reference",
    WeightOnlyKernel: "floating point",
}
"""Kernel -> name of its runtime."""
SLOWEST = (ReferenceKernel, DynamicKernel)
SLOW = ("reference", "floating point")

MEMORY = ("unpacked", "packed")
"""Storage of weights of up to 4 bits: one or two per byte. The latter are unpacked in parts when used."""

KernelFactory = Callable[[QuantizedModule], Kernel | None]
"""Custom runtime: returns the kernel of a layer whose activation is quantized, or None for the reference."""
Backend = str | KernelFactory


def prepare(model: nn.Module, backend: Backend = "auto", memory: str = "unpacked") -> str:
    """Install a kernel in every quantized layer of `model`; returns the name of the backend.

    ``"auto"`` selects the fastest runtime of the model's device: on a CPU ``native``, else ``onednn``; on a GPU
    ``cuda``; else the reference. A model that is moved to another device gets new kernels of `backend`, or of the
    reference if `backend` does not support that device. Layers without an integer kernel (whose activation is not
    quantized, or in oneDNN grouped, transposed, 1- and 3-dimensional convolutions) run in the reference; `fallbacks`
    lists them, `summary` describes the runtime of each layer, and a warning names layers that unexpectedly do not run
    in integers. Convolutions become channels-last.

    Args:
        backend: one of `BACKENDS`, or a function that returns the kernel of a layer.
        memory: one of `MEMORY`. Results are the same. Packed is a little slower in the native runtime and much slower
            in others, which prepare a layer's kernel for each call.

    Raises:
        StepquantError: if `backend` or `memory` is unknown, this machine cannot run the backend, or a custom runtime
            does not return a kernel.
    """
    check_memory(memory)
    if callable(backend):
        if memory != "unpacked":
            raise StepquantError("a custom runtime takes no `memory`. Leave it out.")
        name = getattr(backend, "__name__", type(backend).__name__)
    else:
        check_backend(backend)
        if backend in INTEGER and (reason := INTEGER[backend]()) is not None:
            raise StepquantError(f"backend {backend} cannot run here: {reason}. Set `backend` to 'auto'.")
        name = _resolve(backend, _device_of(model))
    native.undo(model)
    for layer_name, module in quantized_modules(model).items():
        if callable(backend):
            module.use(partial(_custom_kernel, layer_name, backend))
        else:
            module.use(partial(_kernel, backend, memory == "packed"))
    if name == "native":
        native.finish(model)
    elif name == "cuda":
        blocks.fuse(model)
    _lay_out(model)
    for problem in _problems(model, backend, name):
        warnings.warn(problem, stacklevel=2)
    return name


def _problems(model: nn.Module, backend: Backend, name: str) -> list[str]:
    """Reasons why `model` runs slower than it could."""
    problems = []
    if backend == "auto" and (left_out := _left_out(_device_of(model))):
        reasons = "; ".join(f"{other}: {reason}" for other, reason in left_out)
        problems.append(f"stepquant uses the {name} runtime, since faster ones are not available ({reasons}).")
    expected = [layer for layer, module in quantized_modules(model).items() if _class_of(module) in SLOWEST]
    if name == "native":
        whole = {
            attention for attention, found in _quantized_attentions(model).items() if set(OPERANDS) <= {*found.formats}
        }
        expected += [attention for attention in _simulated_attentions(model) if attention in whole]
    if expected and name != "reference":
        problems.append(f"without an integer kernel in {name}, layers run in the slow reference: {_few(expected)}.")
    return problems


def _left_out(device: torch.device) -> list[tuple[str, str]]:
    """Integer runtimes that are faster than the one ``"auto"`` selects on a device, and why they cannot run."""
    found = []
    for name, kind in DEVICE.items():
        if kind == device.type:
            if (reason := INTEGER[name]()) is None:
                break
            found.append((name, reason))
    return found


def summary(model: nn.Module) -> str:
    """One line about the runtimes of the layers and attentions of `model`, and why faster ones are not used."""
    layers: dict[str, list[str]] = {}
    for name, module in quantized_modules(model).items():
        kernel = _class_of(module)
        layers.setdefault(NAMES.get(kernel, kernel.__name__), []).append(name)
    parts = [
        f"{len(names)} {runtime}" + (f" ({_few(names)})" if runtime in SLOW else "")
        for runtime, names in layers.items()
    ]
    runtimes = [f"layers: {', '.join(parts)}"]
    if quantized := _quantized_attentions(model):
        simulated = _simulated_attentions(model)
        count = len(quantized) - len(simulated)
        counts = [f"{count} native"] if count else []
        counts += [f"{len(simulated)} floating point ({_few(simulated)})"] if simulated else []
        runtimes.append(f"attentions: {', '.join(counts)}")
    return "; ".join(
        runtimes + [f"no {name}: {reason}" for name, reason in _left_out(_device_of(model)) if name not in layers]
    )


def _quantized_attentions(model: nn.Module) -> dict[str, QuantizedAttentionProcessor]:
    return {name: attention for name, attention in quantized_attentions(model).items() if attention.formats}


def _simulated_attentions(model: nn.Module) -> list[str]:
    """Names of the attentions whose products are computed in floating point."""
    return [name for name, attention in _quantized_attentions(model).items() if attention.kernel is None]


def _class_of(module: QuantizedModule) -> type[Kernel]:
    return module.kernel.make if isinstance(module.kernel, PassingKernel) else type(module.kernel)  # type: ignore[return-value]


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def check_backend(name: str) -> None:
    """Raise `StepquantError` unless `name` is one of `BACKENDS`."""
    if name not in BACKENDS:
        raise StepquantError(f"unknown backend {name!r}: expected one of {', '.join(BACKENDS)}.")


def resolve_backend(name: str) -> Backend:
    """Return the name of a backend, or load the custom runtime that ``path.py:function`` names, which runs the file.

    Never call it with a name from a checkpoint.

    Raises:
        StepquantError: if the backend, file or function does not exist, the file cannot be run, or the function takes
            other arguments than a layer.
    """
    if ":" in name:
        return load_function(name, "runtime", ["a layer"])
    check_backend(name)  # here, since `prepare` is not called for full-precision models
    return name


def check_memory(memory: str) -> None:
    """Raise `StepquantError` unless `memory` is one of `MEMORY`."""
    if memory not in MEMORY:
        raise StepquantError(f"memory is {memory!r}: expected {' or '.join(MEMORY)}.")


def _device_of(model: nn.Module) -> torch.device:
    return next((module.device for module in quantized_modules(model).values()), torch.device("cpu"))


def _resolve(backend: str, device: torch.device) -> str:
    """Resolve ``"auto"`` for a device; other backends are unchanged."""
    if backend != "auto":
        return backend
    candidates = (name for name, kind in DEVICE.items() if kind == device.type)
    return next((name for name in candidates if INTEGER[name]() is None), "reference")


def _kernel(backend: str, packed: bool, module: QuantizedModule) -> Kernel:
    """Create the kernel of `backend` for a layer on its device."""
    make = _kernel_class(module, _resolve(backend, module.device))
    if make is native.NativeKernel or make is CudaKernel:
        kernel: Any = native.NativeKernel(module, packed=packed) if make is native.NativeKernel else make(module)
        module.release(kernel.integers)  # only the kernel holds the weight now
        return kernel
    return PassingKernel(module, make) if packed else make(module)


def _kernel_class(module: QuantizedModule, backend: str) -> type[Kernel]:
    if module.format.input is None:
        return WeightOnlyKernel
    kernel, device = KERNELS.get(backend), module.device.type
    here = kernel is not None and (device == DEVICE[backend] or (kernel is CudaKernel and cuda.interpreted()))
    return kernel if kernel is not None and here and kernel.supports(module) else _reference(module)


def _reference(module: QuantizedModule) -> type[Kernel]:
    return DynamicKernel if isinstance(module.format.input, DynamicFormat) else ReferenceKernel


class PassingKernel(Kernel):
    """Creates a kernel for each call, so that only the codes stay in memory."""

    def __init__(self, module: QuantizedModule, make: type[Kernel]) -> None:
        super().__init__()
        self.layer, self.make = (module,), make  # in a tuple, so that the layer is not a submodule

    def __deepcopy__(self, memo: dict[int, Any]) -> PassingKernel:
        return PassingKernel(copy.deepcopy(self.layer[0], memo), self.make)

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        module = self.layer[0]
        y: Tensor = self.make(module).to(module.device)(x, row)
        return y


def _custom_kernel(name: str, make: KernelFactory, module: QuantizedModule) -> Kernel:
    """Create the kernel of layer `name` in a custom runtime."""
    if module.format.input is None:
        return WeightOnlyKernel(module)
    kernel = make(module)
    if kernel is not None and not isinstance(kernel, Kernel):
        raise StepquantError(f"the runtime gave layer {name} a {type(kernel).__name__}: expected a Kernel, or None.")
    return _reference(module)(module) if kernel is None else kernel


def _lay_out(model: nn.Module) -> None:
    for convolution in model.modules():
        if isinstance(convolution, nn.Conv2d):  # not the whole model: video models have 5-d tensors
            convolution.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def fallbacks(model: nn.Module) -> list[str]:
    """Names of the quantized layers, then of the quantized attentions, that do not run in integers."""
    kernels = {name: _class_of(module) for name, module in quantized_modules(model).items()}
    layers = [name for name, kernel in kernels.items() if issubclass(kernel, (*SLOWEST, WeightOnlyKernel))]
    return layers + _simulated_attentions(model)


__all__ = [
    "BACKENDS",
    "MEMORY",
    "Backend",
    "KernelFactory",
    "check_backend",
    "check_memory",
    "fallbacks",
    "prepare",
    "resolve_backend",
    "summary",
]
