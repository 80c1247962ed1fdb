"""A simulated GPU: tensors that report a GPU as their device, but are stored in the memory of the CPU.

For tests of code that moves tensors between devices, without a GPU. Within `simulated_gpu` ``x.to(GPU)`` returns such
a tensor; operations on these return others, and mixing them with tensors of the CPU fails as it would on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("simulated")
GPU = torch.device("simulated", 0)
_ATEN = torch.ops.aten
_CROSSING = {
    _ATEN.copy_.default, _ATEN._to_copy.default, _ATEN.index.Tensor, _ATEN.index_put.default, _ATEN.index_put_.default,
    _ATEN._index_put_impl_.default, _ATEN.set_.source_Storage, _ATEN.set_.source_Tensor,
}  # fmt: skip


class MemoryMeter:
    """Bytes in use on the simulated device."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[int, int]] = {}
        self.used = self.peak = 0

    def allocate(self, x: SimulatedTensor) -> None:
        storage = x.inner.untyped_storage()
        key = storage.data_ptr()
        size, count = self.storages.get(key, (storage.nbytes(), 0))
        if count == 0:
            self.used += size
            self.peak = max(self.peak, self.used)
        self.storages[key] = (size, count + 1)
        weakref.finalize(x, self._free, key)

    def _free(self, key: int) -> None:
        size, count = self.storages.pop(key)
        if count > 1:
            self.storages[key] = (size, count - 1)
        else:
            self.used -= size


_meter = MemoryMeter()


class SimulatedTensor(Tensor):
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> SimulatedTensor:
        x = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=GPU, requires_grad=inner.requires_grad,
        )  # fmt: skip
        x.inner = inner
        _meter.allocate(x)
        return x

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SimulatedTensor({self.inner!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied: Tensor = SimulatedTensor(self.inner.detach().clone())
        if getattr(self, "_is_param", False):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def tolist(self) -> Any:
        return self.inner.tolist()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves, tree = tree_flatten((args, kwargs))
    simulated = any(isinstance(x, SimulatedTensor) for x in leaves)
    device = kwargs.get("device")
    to_gpu = device is not None and torch.device(device).type == GPU.type
    to_cpu = device is not None and not to_gpu
    on_cpu = any(isinstance(x, Tensor) and not isinstance(x, SimulatedTensor) and x.dim() > 0 for x in leaves)
    if simulated and on_cpu and func not in _CROSSING:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {GPU} and cpu")
    inner, named = tree_unflatten([x.inner if isinstance(x, SimulatedTensor) else x for x in leaves], tree)
    if to_gpu:
        named["device"] = torch.device("cpu")
    result = func(*inner, **named)
    if func is _ATEN._local_scalar_dense.default or not (simulated or to_gpu):
        return result
    if func._schema.is_mutable and isinstance(result, Tensor):
        return args[0]
    if func is _ATEN._to_copy.default:
        result = result.clone()  # a copy never shares memory
    if to_cpu:
        return result
    return tree_map_only(Tensor, SimulatedTensor, result)


class _Simulation(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def simulated_gpu() -> Iterator[MemoryMeter]:
    """Make `GPU` available; yields a new meter of its memory."""
    global _meter
    _meter = MemoryMeter()
    with _Simulation():
        yield _meter
