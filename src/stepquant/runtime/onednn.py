"""int8 on the CPU: convolution and linear by the oneDNN kernels in torch.

Activations are uint8 codes with a zero point, weights int8, accumulators int32; the kernel applies scale and bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepquant.core.affine import largest_code
from stepquant.core.qtensor import Grid
from stepquant.layers.clock import of_samples
from stepquant.layers.conv import QuantizedConv2d
from stepquant.layers.kernel import Kernel, opaque
from stepquant.layers.quantized import QuantizedModule
from stepquant.runtime.common import along_channels


def supported() -> str | None:
    """Return None if this machine runs the kernels exactly, else the reason."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN int8 kernels"
    try:
        exact = _probe()
    except RuntimeError as error:
        return f"oneDNN refused an int8 product ({str(error).splitlines()[0]})"
    return None if exact else "the CPU has no VNNI instructions, without which int8 products saturate"


def _probe() -> bool:
    """Whether the largest products are exact; without VNNI, pairs are added in 16 bits and saturate."""
    size = 64
    codes = torch.full((size, size), largest_code(8), dtype=torch.uint8)
    weight = torch.ops.onednn.qlinear_prepack(torch.full((size, size), 127, dtype=torch.int8), None)
    scale, zero_point = torch.ones(1, dtype=torch.float32), torch.zeros(1, dtype=torch.int32)
    y = torch.ops.onednn.qlinear_pointwise.tensor(
        codes, scale, zero_point, weight, torch.ones(size, dtype=torch.float32), _zeros(scale.expand(size)), None,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return bool((y == size * largest_code(8) * 127).all())


class OneDnnKernel(Kernel):
    """A linear or convolution; one call per segment of channels with one scale."""

    inverse: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, module: QuantizedModule) -> None:
        super().__init__()
        layer = module.layer()
        assert isinstance(layer.input, Grid)
        self.dim = module.channel_dim
        self.top = largest_code(layer.input.bits)
        self.static = layer.input.rows == 1
        self.geometry = None
        if isinstance(module, QuantizedConv2d):
            self.geometry = [list(module.stride), list(module.padding), list(module.dilation)]
        scale, zero_point = layer.input.scale.squeeze(2), layer.input.zero_point.squeeze(2)
        self.register_buffer("scale", scale.clone(), persistent=False)
        self.register_buffer("inverse", scale.reciprocal(), persistent=False)
        self.register_buffer("zero_point", zero_point.int(), persistent=False)
        self.smoothing = layer.smoothing
        self.spans: list[tuple[int, int, int]] = []
        self.weights: list[tuple[Tensor, Tensor, Tensor]] = []
        self.bias = layer.bias
        for channels, group, weight in layer.segments():
            weight_scale = weight.grid.scale[0, 0]
            self.spans.append((channels.start, channels.stop, group))
            self.weights.append((self._pack(weight.integers(), weight_scale), weight_scale, _zeros(weight_scale)))

    def _pack(self, weight: Tensor, scale: Tensor) -> Tensor:
        if self.geometry is None:
            return torch.ops.onednn.qlinear_prepack(weight, None)
        return torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 0, *self.geometry, 1, None)

    @opaque
    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        if self.static or row.dim() == 0:
            return self._run(x, 0 if self.static else int(row))
        # Samples of several steps in one batch: one call per step.
        rows = of_samples(row, x.shape[0])
        y: Tensor | None = None
        for step in rows.unique().tolist():
            chosen = (rows == step).nonzero().squeeze(1)
            part = self._run(x[chosen], step)
            if y is None:
                y = part.new_empty(x.shape[0], *part.shape[1:])
            y[chosen] = part
        assert y is not None
        return y

    def codes(self, x: Tensor, row: int, group: int, smoothing: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Quantize x.

        Args:
            smoothing: float32 [channels of x].

        Returns:
            uint8 codes as `core.affine.quantize` defines them, and their sum per sample, NaN if x has NaN there.
        """
        inverse = self.inverse[row, group]
        if smoothing is not None:
            inverse = along_channels((self.scale[row, group] * smoothing).reciprocal(), self.dim, x.dim())
        steps = x * inverse
        steps = steps.round_().add_(self.zero_point[row, group]).clamp_(0, self.top)
        # Conversion via int16 is vectorized; float to uint8 is not.
        return steps.to(torch.int16).to(torch.uint8), steps.sum(tuple(range(1, x.dim())))

    def _run(self, x: Tensor, row: int) -> Tensor:
        dtype, x = x.dtype, x.float()
        y: Tensor | None = None
        for (start, stop, group), weight in zip(self.spans, self.weights, strict=True):
            part = x if len(self.spans) == 1 else x.narrow(self.dim, start, stop - start)
            codes, sums = self.codes(part, row, group, None if self.smoothing is None else self.smoothing[start:stop])
            product = self._multiply(codes, row, group, weight, self.bias if y is None else None)
            if bool(sums.isnan().any()):
                product[sums.isnan()] = torch.nan  # which codes cannot represent
            y = product if y is None else y.add_(product)
        assert y is not None
        return y.to(dtype)

    def _multiply(
        self, codes: Tensor, row: int, group: int, weight: tuple[Tensor, Tensor, Tensor], bias: Tensor | None
    ) -> Tensor:
        scale, zero_point = self.scale[row, group : group + 1], self.zero_point[row, group : group + 1]
        end: Any = (1.0, 0, torch.float32, "none", [], "")
        if self.geometry is None:
            return torch.ops.onednn.qlinear_pointwise.tensor(codes, scale, zero_point, *weight, bias, *end)
        return torch.ops.onednn.qconv2d_pointwise.tensor(
            codes, scale, zero_point, *weight, bias, *self.geometry, 1, *end
        )


def _zeros(scale: Tensor) -> Tensor:
    return torch.zeros(scale.shape[0], dtype=torch.int64)
