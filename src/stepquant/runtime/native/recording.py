"""Record the kernel calls of a block once, and replay them with one call into C++.

The kernel calls of a block are the same at every step, except for the addresses of its inputs and outputs and the row
of the activation tables. A recording stores the structures of the calls of one step and a list of the fields that
change; `Recording.replay` sets these fields and makes all calls without Python between them. Intermediate tensors get
offsets in one arena, whose memory is reused as soon as nothing reads it any more.

A `Recorder` sees every tensor operation of a block. Views and allocations need nothing at replay, and concatenating two
images along their channels is a kernel call; after any other operation, or after reading a value, the block cannot be
recorded. Nor can it if a kernel reads memory that may be gone at replay: that of a tensor which is neither the block's
nor known to last.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_void_p, sizeof
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stepquant.runtime.native.build import library
from stepquant.runtime.native.library import TYPES, Attention, Call, GroupNorm, Join, Pointer, Step, no_memory
from stepquant.runtime.native.memory import ARENA, CODES, FIRST, NOWHERE, Memory, lay_out, scratch
from stepquant.runtime.native.tables import check_row

MOST_BYTES = 1 << 28
"""Bytes that a block may allocate while it is recorded: all are held, and in larger blocks Python takes little time."""

KINDS = (Call, GroupNorm, Attention, Join)
"""In the order of `Kind` in ``call.h``."""

_ACTIVE = threading.local()
_ATEN = torch.ops.aten
_FRESH = (
    _ATEN.empty.memory_format,
    _ATEN.empty_like.default,
    _ATEN.empty_strided.default,
    _ATEN.new_empty.default,
    _ATEN.new_empty_strided.default,
)
_READS = (_ATEN._local_scalar_dense.default, _ATEN.item.default)


def record(structure: ctypes.Structure, codes: int = 0) -> None:
    """Add the kernel call that was just made with `structure` to this thread's recording, if there is one.

    Args:
        codes: bytes of a layer's codes.
    """
    recorder: Recorder | None = getattr(_ACTIVE, "recorder", None)
    if recorder is not None:
        recorder.add(structure, codes)


def is_recording() -> bool:
    """Whether this thread is recording."""
    return getattr(_ACTIVE, "recorder", None) is not None


class Output(NamedTuple):
    """A tensor that a block returns: how to allocate it, or the index of the input that it is."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    of_input: int | None


class Recording:
    """The calls of a block for inputs of one layout.

    Args:
        structures: of the calls, one after the other.
        steps, pointers: structures `Step` and `Pointer`: which calls to make, and which fields to set before.
        outputs: the tensors that the block returns.
        template: the value that the block returns, with indices of `outputs` in the place of tensors.
        kept: tensors that absolute addresses point into.
        inputs: number of input tensors.
        arena, codes: bytes.
        rows: rows of the shortest activation table with more than one; None if there is none.
    """

    def __init__(
        self,
        structures: bytes,
        steps: list[Any],
        pointers: list[Any],
        outputs: list[Output],
        template: Any,
        kept: list[Tensor],
        *,
        inputs: int,
        arena: int,
        codes: int,
        rows: int | None,
    ) -> None:
        self.structures = ctypes.create_string_buffer(structures, len(structures))
        self.steps, self.pointers = (Step * len(steps))(*steps), (Pointer * len(pointers))(*pointers)
        self.outputs, self.template, self.kept = outputs, template, kept
        self.slots = (c_void_p * (FIRST + inputs + len(outputs)))()
        self.arena, self.codes, self.rows = arena, codes, rows
        self.lock = threading.Lock()

    def replay(self, inputs: list[Tensor], row: int) -> Any:
        """What the block returns for `inputs` at a row of the tables. Not for two threads at the same time.

        Raises:
            StepquantError: if a table has no such row, or memory is not sufficient.
        """
        if self.rows is not None:
            check_row(row, self.rows)
        tensors = [
            inputs[output.of_input]
            if output.of_input is not None
            else torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="cpu")
            for output in self.outputs
        ]
        slots = self.slots
        slots[CODES], slots[ARENA] = scratch("codes", self.codes), scratch("arena", self.arena)
        for index, tensor in enumerate((*inputs, *tensors), FIRST):
            slots[index] = tensor.data_ptr()
        if library().sq_replay(
            self.structures, byref(self.steps), len(self.steps), byref(self.pointers), len(self.pointers),
            byref(slots), row,
        ):  # fmt: skip
            raise no_memory()
        return _filled(self.template, tensors)


class Recorder(TorchDispatchMode):
    """Runs a block's code unchanged and records its kernel calls.

    Args:
        inputs: every tensor that the block is given.
        row: the clock's row, int64 []; `row_value` is its value.
        tables: [R, ...] tensors of which kernels read one row.
        lasting: tensors whose memory stays valid while the recording is used: those of kernels, and parameters.

    Attributes:
        obstacle: why the block cannot be recorded, or None.
    """

    def __init__(
        self, inputs: list[Tensor], row: Tensor, row_value: int, tables: list[Tensor], lasting: list[Tensor]
    ) -> None:
        super().__init__()
        self.inputs, self.row, self.row_value = inputs, row, row_value
        by_row = [(x, x.stride(0) * x.element_size()) for x in tables if len(x) > 1]
        self.rows = min((len(x) for x, _ in by_row), default=None)
        self.lasting = [(*_extent(x), x, step) for x, step in (*by_row, *((x, 0) for x in lasting))]
        self.kept: dict[int, Tensor] = {}
        self.memory: list[Memory] = []
        self.structures, self.steps = bytearray(), list[Any]()
        self.pointers: list[tuple[int, Memory | int, int, int]] = []
        self.codes = self.held = 0
        self.obstacle: str | None = None
        spans = sorted(_extent(x) for x in inputs)
        if any(second[0] < first[1] for first, second in pairwise(spans)):
            self.obstacle = "inputs that share memory"

    def __enter__(self) -> Recorder:
        _ACTIVE.recorder = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _ACTIVE.recorder = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ATEN.cat.default and (joined := self._join(*args, **kwargs)) is not None:
            return joined
        result = func(*args, **kwargs)
        if func in _FRESH:
            self._allocate(result)
        elif not (func.is_view and _is_within(result, args[0])) and not (func in _READS and self._is_row(args[0])):
            self.obstacle = self.obstacle or str(func)
        return result

    def add(self, structure: ctypes.Structure, codes: int = 0) -> None:
        """Append a call with `structure`; `codes` as for `record`."""
        base = len(self.structures)
        self.codes = max(self.codes, codes)
        self.steps.append(Step(KINDS.index(type(structure)), base))
        self.structures += bytes(structure)
        for at in _pointer_fields(type(structure)):
            address = c_void_p.from_buffer(structure, at).value
            if address is None:
                continue
            if isinstance(structure, Call) and at == Call.codes.offset:
                self.pointers.append((base + at, CODES, 0, 0))
            else:
                self.pointers.append((base + at, *self._find(address)))

    def finish(self, result: Any) -> Recording | None:
        """The recording of a block that returned `result`; None if there was an obstacle."""
        tensors: list[Tensor] = []
        template = self._template(result, tensors)
        outputs = [self._output(index, x) for index, x in enumerate(tensors)]
        if self.obstacle is not None:
            return None
        arena = lay_out([memory for memory in self.memory if memory.slot == ARENA and memory.last >= 0])
        pointers = [
            Pointer(at, where, offset, by_row)
            if isinstance(where, int)
            else Pointer(at, where.slot, where.offset + offset, by_row)
            for at, where, offset, by_row in self.pointers
        ]
        return Recording(
            bytes(self.structures), self.steps, pointers, outputs, template, list(self.kept.values()),
            inputs=len(self.inputs), arena=arena, codes=self.codes, rows=self.rows,
        )  # fmt: skip

    def _allocate(self, x: Tensor) -> None:
        if x.device.type != "cpu":
            self.obstacle = self.obstacle or f"memory on {x.device}"
            return
        start, size = x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()
        self.memory.append(Memory(start, start + size, x, len(self.steps)))
        self.held += size
        if self.held > MOST_BYTES:
            self.obstacle = self.obstacle or "too much memory"

    def _is_row(self, x: Tensor) -> bool:
        return x.data_ptr() == self.row.data_ptr()

    def _join(self, tensors: list[Tensor], dim: int = 0) -> Tensor | None:
        """``torch.cat`` of two channels-last images along their channels; None for any other arguments."""
        if len(tensors) != 2 or dim != 1 or any(x.dim() != 4 or x.dtype not in TYPES for x in tensors):
            return None
        first, second = tensors
        fits = first.dtype == second.dtype and first.shape[2:] == second.shape[2:] and len(first) == len(second)
        if not fits or not all(x.is_contiguous(memory_format=torch.channels_last) for x in tensors):
            return None
        batch, channels, height, width = first.shape
        y = torch.empty(
            (batch, channels + second.shape[1], height, width),
            dtype=first.dtype,
            device="cpu",
            memory_format=torch.channels_last,
        )
        self._allocate(y)
        size = first.element_size()
        call = Join(
            (c_void_p * 2)(first.data_ptr(), second.data_ptr()), y.data_ptr(),
            (ctypes.c_int64 * 2)(channels * size, second.shape[1] * size), batch * height * width,
            torch.get_num_threads(),
        )  # fmt: skip
        if library().sq_join(byref(call)):
            raise no_memory()
        self.add(call)
        return y

    def _find(self, address: int) -> tuple[Memory | int, int, int]:
        """The memory or slot that `address` points into, the offset in it, and the bytes to add for each row."""
        for memory in reversed(self.memory):
            if memory.start <= address < memory.stop:
                memory.last = len(self.steps) - 1
                return memory, address - memory.start, 0
        for index, x in enumerate(self.inputs):
            start, stop = _extent(x)
            if start <= address < stop:
                return FIRST + index, address - start, 0
        for start, stop, x, by_row in self.lasting:
            if start <= address < stop:
                self.kept[start] = x
                return NOWHERE, address - self.row_value * by_row, by_row
        self.obstacle = self.obstacle or "memory that may be gone at replay"
        return NOWHERE, address, 0

    def _template(self, result: Any, tensors: list[Tensor]) -> Any:
        if isinstance(result, Tensor):
            if not any(x is result for x in tensors):
                tensors.append(result)
            return next(index for index, x in enumerate(tensors) if x is result)
        if isinstance(result, tuple):
            return tuple(self._template(part, tensors) for part in result)
        self.obstacle = self.obstacle or f"a result of type {type(result).__name__}"
        return None

    def _output(self, index: int, x: Tensor) -> Output:
        of_input = next((place for place, other in enumerate(self.inputs) if other is x), None)
        if of_input is None:
            start = x.untyped_storage().data_ptr()
            memory = next((memory for memory in self.memory if memory.start == start), None)
            dense = _extent(x) == (start, start + x.untyped_storage().nbytes())
            if memory is None or not dense or memory.slot != ARENA:
                self.obstacle = self.obstacle or "a result that is part of another tensor"
            else:
                memory.slot = FIRST + len(self.inputs) + index
        return Output(tuple(x.shape), x.stride(), x.dtype, of_input)


def _filled(template: Any, tensors: list[Tensor]) -> Any:
    if isinstance(template, int):
        return tensors[template]
    return tuple(_filled(part, tensors) for part in template)


def _is_within(result: Any, x: Tensor) -> bool:
    """Whether `result` shares the memory of x: in inference mode some view operations copy if they must."""
    parts = result if isinstance(result, (list, tuple)) else [result]
    return all(part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for part in parts)


def _extent(x: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of x and of the byte after its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else -1
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _pointer_fields(structure: Any) -> list[int]:
    """Byte offsets of all pointers in a structure, including those in nested structures and arrays."""
    if structure is c_void_p:
        return [0]
    if issubclass(structure, ctypes.Array):
        inner = _pointer_fields(structure._type_)
        return [index * sizeof(structure._type_) + at for index in range(structure._length_) for at in inner]
    if not issubclass(structure, ctypes.Structure):
        return []
    fields = [(getattr(structure, name).offset, kind) for name, kind in structure._fields_]
    return [offset + at for offset, kind in fields for at in _pointer_fields(kind)]
