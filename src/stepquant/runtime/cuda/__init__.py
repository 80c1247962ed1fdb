"""int8 and int4 on a GPU: Triton kernels, imported when a layer needs them."""

from __future__ import annotations

from stepquant.runtime.cuda.device import interpreted, supported
from stepquant.runtime.cuda.kernel import CudaKernel

__all__ = ["CudaKernel", "interpreted", "supported"]
