"""A runtime of your own: linears by torch's int8 matrix product, which accelerators have as well.

python examples/own_runtime.py FOLDER
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

import stepquant
from stepquant.core.affine import quantize
from stepquant.layers.attention import per_sample
from stepquant.layers.install import quantized_modules
from stepquant.layers.modules import Kernel, QuantizedLinear, QuantizedModule
from stepquant.models import denoiser_name
from stepquant.pipelines.generate import generate, make_request

MIDDLE = 128
"""Taken off the unsigned codes of activations, so that they fit int8."""


class IntMatmul(Kernel):
    """``y = ((codes - 128) W + (128 - zero_point) sum W) * (s_x * s_w) + bias``; the sums are exact, in int32."""

    def __init__(self, module: QuantizedModule) -> None:
        super().__init__()
        layer = module.layer()  # integers and tables, checked
        assert layer.activation is not None
        self.table, self.bias = layer.activation, layer.bias
        self.weight = layer.weight.integers().t().contiguous()  # int8 [in, out]
        self.sums = self.weight.sum(dim=0, dtype=torch.int32)
        self.scale = layer.weight.scale[0]

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        """x: float [B, ..., in]; row: int64, [] or, where samples are at different steps, [B]."""
        at = self.table.at(row)  # [1], or [B, 1] of one row a sample
        scale, zero_point = (per_sample(values, x) if values.dim() == 2 else values for values in at)
        codes = quantize(x.float(), scale, zero_point, self.table.bits) - MIDDLE
        product = torch._int_mm(codes.to(torch.int8).reshape(-1, x.shape[-1]), self.weight)
        sums = product.reshape(*x.shape[:-1], -1) + (MIDDLE - zero_point.int()) * self.sums
        y = sums.float() * (scale * self.scale)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def int_matmul(module: QuantizedModule) -> Kernel | None:
    """The kernel of a linear with one scale for all input channels; None leaves a layer to the reference."""
    shape = module.layer_format
    grouped = len(shape.weight_groups) > 1 or len(shape.activation_groups) > 1
    if not isinstance(module, QuantizedLinear) or grouped or shape.smoothed:
        return None
    return IntMatmul(module)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/own_runtime.py FOLDER")
    pipe = stepquant.load(sys.argv[1], backend=int_matmul)
    kernels = [module.kernel for module in quantized_modules(getattr(pipe, denoiser_name(pipe))).values()]
    print(f"{sum(isinstance(kernel, IntMatmul) for kernel in kernels)} of {len(kernels)} layers by int8 matmul")
    print("drawn:", generate(pipe, make_request(pipe, 10), range(4), 0).shape)
