"""A custom runtime: linear layers with torch's int8 matrix product, which accelerators have as well.

python examples/custom_runtime.py FOLDER
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import stepquant
from stepquant.core.affine import quantize
from stepquant.layers.attention import per_sample
from stepquant.layers.kernel import Kernel
from stepquant.layers.linear import QuantizedLinear
from stepquant.layers.quantized import QuantizedModule, quantized_modules
from stepquant.models import denoiser_name
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request

MIDDLE = 128
"""Taken off the unsigned codes of activations, so that they fit int8."""


class IntMatmul(Kernel):
    """``y = ((codes - 128) W + (128 - zero_point) sum W) * (s_x * s_w) + bias``; the sums are exact, in int32."""

    def __init__(self, module: QuantizedModule) -> None:
        super().__init__()
        layer = module.layer()  # integers and tables, checked
        assert layer.input is not None
        self.grid, self.bias = layer.input, layer.bias
        self.weight = layer.weight.integers().t().contiguous()  # int8 [in, out]
        self.sums = self.weight.sum(dim=0, dtype=torch.int32)
        self.scale = layer.weight.grid.scale[0, 0]

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        """x: float [B, ..., in]; row: int64, [] or, where samples are at different steps, [B]."""
        at = (values[..., 0] for values in self.grid.at(row))  # [1], or [B, 1] with one row per sample
        scale, zero_point = (per_sample(values, x) if values.dim() == 2 else values for values in at)
        codes = quantize(x.float(), scale, zero_point, self.grid.bits) - MIDDLE
        product = torch._int_mm(codes.to(torch.int8).reshape(-1, x.shape[-1]), self.weight)
        sums = product.reshape(*x.shape[:-1], -1) + (MIDDLE - zero_point.int()) * self.sums
        y = sums.float() * (scale * self.scale)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def int_matmul(module: QuantizedModule) -> Kernel | None:
    """The kernel of a linear with one scale for all input channels; None leaves a layer to the reference."""
    weight, grid = module.format.weight, module.format.input
    grouped = len(weight.groups) > 1 or (grid is not None and len(grid.groups) > 1)
    if not isinstance(module, QuantizedLinear) or grouped or module.format.transforms:
        return None
    return IntMatmul(module)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/custom_runtime.py FOLDER")
    pipe = stepquant.load(sys.argv[1], backend=int_matmul)
    kernels = [module.kernel for module in quantized_modules(getattr(pipe, denoiser_name(pipe))).values()]
    print(f"{sum(isinstance(kernel, IntMatmul) for kernel in kernels)} of {len(kernels)} layers use int8 products")
    print("images:", generate(pipe, make_request(pipe, 10), range(4), 0).shape)
