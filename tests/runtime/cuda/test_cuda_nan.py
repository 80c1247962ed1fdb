"""NaN in an activation reaches the output of CUDA kernels, as in the reference runtime."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepquant.runtime import cuda
from stepquant.runtime.reference import ReferenceKernel
from tests.runtime.cuda.test_cuda_kernel import BITS, ROWS, Norm, on, run
from tests.runtime.test_runtimes import SPLITS, convolution, linear

pytestmark = pytest.mark.skipif(cuda.supported() is not None, reason=str(cuda.supported()))


def assert_nan_as(found: Tensor, expected: Tensor, clean: Tensor) -> None:
    """NaN wherever the reference has it, in sample 1; sample 0 is unaffected."""
    assert bool(expected.isnan().any()) and bool(found.isnan()[expected.isnan()].all())
    assert torch.equal(found[0], clean[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("split", SPLITS)
def test_layers(split, row, dtype):
    for module, shape in (
        (convolution(7, 6, 3, padding=1, split=SPLITS[split]), (2, 7, 5, 4)),
        (linear(split=SPLITS[split], smoothed=True), (2, 3, 7)),
        (linear(split=SPLITS[split]), (2, 7)),
    ):
        x = torch.randn(shape).to(dtype)
        clean = run(module, x, row)
        assert bool(clean.isfinite().all())
        x[1, -1] = torch.nan
        assert_nan_as(run(module, x, row), ReferenceKernel(module)(x, row), clean)


@pytest.mark.parametrize("bits", BITS)
def test_many_channels(bits):
    """Several programs quantize a row; NaN is in the last channel."""
    module, row, x = linear(300, 5, bits=bits), torch.tensor(1), torch.randn(2, 300)
    clean = run(module, x, row)
    x[1, 299] = torch.nan
    assert_nan_as(run(module, x, row), ReferenceKernel(module)(x, row), clean)


@pytest.mark.parametrize("name", ["x", "multiply", "add"])
def test_normalization(name):
    module, row = convolution(7, 6, 3, padding=1), torch.tensor(1)
    given = {"x": torch.randn(2, 7, 5, 4), "multiply": torch.rand(2, 7), "add": torch.randn(2, 7)}

    def fused() -> Tensor:
        norm = on(Norm(given["multiply"], given["add"]))
        return run(module, given["x"], row, norm=norm, activation="silu", upsample=2)

    clean = fused()
    given[name][1, 3] = torch.nan
    found = fused()
    assert torch.equal(found[0], clean[0]) and bool(found[1].isnan().all())
