"""int8 and int4 on a GPU by Triton kernels, which are imported on first use."""

from __future__ import annotations

from stepquant.runtime.cuda.device import interpreted, supported
from stepquant.runtime.cuda.kernel import CudaKernel

__all__ = ["CudaKernel", "interpreted", "supported"]
