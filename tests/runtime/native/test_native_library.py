"""The boundary between Python and C++: layouts of structures, and memory that is not there."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int32

import pytest
import torch

from stepquant.errors import StepquantError
from stepquant.runtime.native import attention, kernel, library, memory, norms
from stepquant.runtime.native.build import library as compiled
from tests.runtime.native.test_native_attention import processor
from tests.runtime.test_runtimes import linear

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("name", [structure.__name__ for structure in library.STRUCTURES])
def test_structure_of_another_layout(name, monkeypatch):
    """A field of another size, two fields that changed places, a field too many: none is read as something else."""
    library.declare(compiled())
    structure = next(structure for structure in library.STRUCTURES if structure.__name__ == name)
    fields = list(structure._fields_)
    shorter = [(fields[0][0], ctypes.c_int16), *fields[1:]]
    longer = [*fields, ("more", ctypes.c_int64)]
    swapped = [(fields[1][0], fields[0][1]), (fields[0][0], fields[1][1]), *fields[2:]]
    for changed in (shorter, longer, swapped, fields[:-1]):
        other = type(name, (ctypes.Structure,), {"_fields_": changed})
        monkeypatch.setattr(library, "STRUCTURES", (other,))
        with pytest.raises(StepquantError, match=f"the structure {name} of the native kernels has another layout"):
            library.declare(compiled())


def test_every_structure_is_compared():
    structures = {value for value in vars(library).values() if isinstance(value, type(library.Call))}
    assert structures == set(library.STRUCTURES)


HUGE = 1 << 44


def test_memory_that_cannot_be_allocated():
    """The C++ functions return 1 before they touch anything."""
    functions = compiled()
    top = ctypes.addressof(held := ctypes.c_int32(255))
    grids = (library.OperandGrid * 4)(*(library.OperandGrid(top=top) for _ in range(4)))
    sizes = dict(batch=1, heads=1, key_heads=1, length=HUGE, key_length=HUGE, size=64)
    given = library.Attention(grids=grids, **sizes, threads=1)
    assert functions.sq_attention(byref(given)) == 1
    given = library.GroupNorm(batch=HUGE, pixels=64, channels=16, groups=1, threads=1)
    assert functions.sq_group_norm(byref(given)) == 1
    flags = ctypes.create_string_buffer(1)
    given = library.Call(codes=ctypes.addressof(flags), top=top, threads=1)
    given.layer.outputs, given.positions.batch = HUGE, 1
    assert functions.sq_layer(byref(given)) == 1
    steps = (library.Step * 1)(library.Step(0, 0))
    assert functions.sq_replay(byref(given), byref(steps), 1, None, 0, None, 0) == 1
    assert held.value == 255


class Full:
    """A library whose functions find no memory."""

    def __getattr__(self, name):
        return lambda *_args: 1


def test_no_memory_is_one_sentence(monkeypatch):
    row, x = torch.tensor(0), torch.randn(2, 4, 8)
    monkeypatch.setattr(norms, "library", Full)
    layer, heads = kernel.NativeKernel(linear(8, 5)), attention.NativeAttention(processor())
    layer.library = heads.library = Full()
    for call in (
        lambda: layer(x, row),
        lambda: heads(*torch.randn(3, 1, 1, 2, 4), None, row),
        lambda: norms.group_norm(x, torch.nn.GroupNorm(2, 8)),
        lambda: memory.scratch("never", 1 << 60),
    ):
        with pytest.raises(StepquantError, match="not enough memory for a layer"):
            call()


def test_functions_return_int():
    assert all(getattr(compiled(), name).restype is c_int32 for name in (*library.FUNCTIONS, "sq_replay"))
