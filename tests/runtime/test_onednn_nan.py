"""NaN in an activation reaches the output of oneDNN's kernels; the products need not be exact for that."""

from __future__ import annotations

import pytest
import torch

from stepquant.runtime.onednn import OneDnnKernel
from stepquant.runtime.reference import ReferenceKernel
from tests.runtime.test_runtimes import SPLITS, convolution, linear

needs_operators = pytest.mark.skipif(
    not hasattr(torch.ops.onednn, "qlinear_pointwise") or not torch.backends.mkldnn.is_available(),
    reason="this build of torch has no oneDNN int8 kernels",
)


@needs_operators
@pytest.mark.parametrize("row", [torch.tensor(1), torch.tensor([2, 0, 1])], ids=["one step", "mixed steps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", SPLITS)
def test_layers(split, dtype, row):
    for module, shape in (
        (convolution(7, 6, 3, padding=1, split=SPLITS[split], smoothed=True), (3, 7, 5, 4)),
        (linear(split=SPLITS[split]), (3, 2, 7)),
    ):
        kernel, x = OneDnnKernel(module), torch.randn(shape).to(dtype)
        clean = kernel(x, row)
        x[1, -1] = torch.nan
        found, expected = kernel(x, row), ReferenceKernel(module)(x, row)
        assert bool(found.isnan()[expected.isnan()].all()) and bool(expected.isnan().any())
        assert bool(clean.isfinite().all()) and torch.equal(found[[0, 2]], clean[[0, 2]])
