"""A linear or convolution in integers on a GPU: quantize in one pass, multiply, and scale in the epilogue."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.core.qtensor import Grid, QTensor
from stepquant.layers.conv import QuantizedConv2d
from stepquant.layers.kernel import Capabilities, Kernel
from stepquant.layers.quantized import QuantizedModule
from stepquant.runtime.native.norms import Norm

MIDDLE = 128
"""Subtracted from codes, since integer tensor cores multiply signed numbers."""


class Piece(nn.Module):
    """Input channels with one weight scale and one activation scale, in the layout of `products`.

    Buffers:
        weight: int8 [out, taps, in]; up to 4 bits, uint8 [out, taps, half of in] with two codes per byte.
        weight_zero_point: int8 [out] of the latter, else None.
        weight_sum: int32 [out], sum of the integer weight; weight_scale: float32 [out].
    """

    weight: Tensor
    weight_zero_point: Tensor | None
    weight_sum: Tensor
    weight_scale: Tensor

    def __init__(self, channels: slice, group: int, part: QTensor) -> None:
        super().__init__()
        self.start, self.channels, self.group = channels.start, channels.stop - channels.start, group
        integers, zero_point = part.integers(), None
        weight = integers.flatten(2) if integers.dim() == 4 else integers[..., None]
        weight, total = weight.transpose(1, 2), weight.sum((1, 2), dtype=torch.int32)
        if part.bits <= 4:
            zero_point = part.grid.zero_point[0, 0].to(torch.int8)
            weight = pack_halves(weight + zero_point[:, None, None])
        self.register_buffer("weight", weight.contiguous(), persistent=False)
        self.register_buffer("weight_zero_point", zero_point, persistent=False)
        self.register_buffer("weight_sum", total, persistent=False)
        self.register_buffer("weight_scale", part.grid.scale[0, 0].clone(), persistent=False)

    def integers(self) -> Tensor:
        """int8 [out, taps, in]."""
        if self.weight_zero_point is None:
            return self.weight
        codes = torch.cat([self.weight & 15, self.weight >> 4], dim=2)[..., : self.channels].to(torch.int8)
        return codes - self.weight_zero_point[:, None, None]


def pack_halves(codes: Tensor) -> Tensor:
    """4-bit codes [out, taps, in] -> uint8 [out, taps, half of in]: channel j below channel j + half."""
    half = (codes.shape[2] + 1) // 2
    low, high = codes[..., :half], F.pad(codes[..., half:], (0, codes.shape[2] % 2))
    return (low | (high << 4)).view(torch.uint8)


class CudaKernel(Kernel):
    """One layer. `forward` runs the layer alone; `run` also fuses operations around it.

    The table row is read on the device, so a captured CUDA graph runs any step if the timestep is a tensor there.
    """

    capabilities = Capabilities(grouped_convolutions=True)
    fuses = True
    scale: Tensor
    zero_point: Tensor
    smoothing: Tensor | None
    bias: Tensor | None
    first_row: Tensor

    def __init__(self, module: QuantizedModule) -> None:
        super().__init__()
        importlib.import_module("stepquant.runtime.cuda.ops")  # registers torch.ops.stepquant; needs triton
        layer = module.layer()
        assert isinstance(layer.input, Grid)
        self.outputs, self.bits = module.weight_shape[0], layer.input.bits
        self.geometry = Geometry.of(module)
        buffers = {
            "scale": layer.input.scale.squeeze(2).clone(),
            "zero_point": layer.input.zero_point.squeeze(2).int() - MIDDLE,
            "smoothing": None if layer.smoothing is None else layer.smoothing.clone(),
            "bias": None if layer.bias is None else layer.bias.clone(),
            "first_row": torch.zeros(1, dtype=torch.int64),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        self.pieces = nn.ModuleList(Piece(*segment) for segment in layer.segments())

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        return self.run(x, row)

    @staticmethod
    def group_norm(x: Tensor, norm: nn.GroupNorm) -> Norm:
        """Normalization of x, float [B, C, H, W] or [B, N, C], as scale and shift per sample and channel."""
        pixels = channels_adjacent(x, image=x.dim() == 4)
        return Norm(*torch.ops.stepquant.group_norm(pixels, norm.weight, norm.bias, norm.num_groups, norm.eps))

    def integers(self) -> Tensor:
        """`QTensor.integers` of the weight: int8 [out, in, *kernel], on the kernel's device."""
        weight = torch.cat([piece.integers() for piece in self._pieces()], dim=2).transpose(1, 2)
        return weight.squeeze(2) if self.geometry is None else weight.unflatten(2, self.geometry.size)

    def _pieces(self) -> list[Piece]:
        return list(self.pieces)  # type: ignore[arg-type]

    def run(
        self,
        x: Tensor,
        row: Tensor,
        *,
        norm: Norm | None = None,
        activation: str | None = None,
        upsample: int = 1,
        extra: int = 0,
        channel_add: Tensor | None = None,
        residual: Tensor | None = None,
        factor: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``(layer(upsample(activation(norm(x)))) + channel_add + residual) * factor``.

        Args:
            x: float [B, C, H, W], or [B, ..., in] for a linear.
            row: int64 [] or [B]; on another device than x, it is copied, which synchronizes.
            norm: scale and shift of channels, from `group_norm`.
            activation: ``silu``, or None.
            upsample: 2 repeats every pixel in both directions; convolutions only.
            extra: rows and columns of zeros below and to the right of the image, in addition to the padding.
            channel_add: float32 [B, out], contiguous; convolutions only.
            residual: float, of the output's shape.
            dtype: dtype of the result; by default that of x.
        """
        row = self.first_row if self.scale.shape[0] == 1 else row.reshape(-1).to(x.device)
        pixels = channels_adjacent(x, image=self.geometry is not None)
        y: Tensor | None = None
        for index, piece in enumerate(self._pieces()):
            span = slice(None) if len(self.pieces) == 1 else slice(piece.start, piece.start + piece.channels)
            codes, invalid = torch.ops.stepquant.quantize(
                pixels[..., span], row, self.scale, self.zero_point, piece.group, self.bits,
                None if self.smoothing is None else self.smoothing[span],
                *((None, None) if norm is None else (values[:, span] for values in (norm.multiply, norm.add))),
                activation == "silu",
            )  # fmt: skip
            last = index == len(self.pieces) - 1
            scaling = (
                piece.weight_sum, piece.weight_scale, self.bias if y is None else None, row, self.scale,
                self.zero_point, piece.group,
            )  # fmt: skip
            ending = (factor if last else 1.0, (dtype or x.dtype) if last else torch.float32)
            if self.geometry is None:
                other = y if y is not None or residual is None else residual.reshape(-1, self.outputs).contiguous()
                y = torch.ops.stepquant.matmul(
                    codes.flatten(0, 1), invalid, piece.weight.flatten(1), piece.weight_zero_point, *scaling, other,
                    *ending,
                )  # fmt: skip
                continue
            other = y if y is not None or residual is None else residual.permute(0, 2, 3, 1).contiguous()
            y = self.geometry.convolve(
                codes.unflatten(1, x.shape[2:]), invalid, piece, scaling, channel_add if y is None else None, other,
                ending, upsample, extra,
            )  # fmt: skip
        assert y is not None
        return y.view(*x.shape[:-1], self.outputs) if self.geometry is None else y.permute(0, 3, 1, 2)


class Geometry(NamedTuple):
    """Windows of a convolution."""

    size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    parts: int

    @classmethod
    def of(cls, module: QuantizedModule) -> Geometry | None:
        """None for a linear."""
        if not isinstance(module, QuantizedConv2d):
            return None
        height, width = module.weight_shape[2:]
        return cls((height, width), module.stride, module.padding, module.dilation, module.groups)

    def convolve(
        self,
        codes: Tensor,
        invalid: Tensor,
        piece: Piece,
        scaling: tuple[Any, ...],
        channel_add: Tensor | None,
        residual: Tensor | None,
        ending: tuple[float, torch.dtype],
        upsample: int,
        extra: int,
    ) -> Tensor:
        """codes: int8 [B, H, W, C], invalid: float32 [B] -> float [B, H', W', out]."""
        output = [
            (pixels * upsample + 2 * padding + extra - dilation * (size - 1) - 1) // stride + 1
            for pixels, size, stride, padding, dilation in zip(
                codes.shape[1:3], self.size, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        factor, dtype = ending
        return torch.ops.stepquant.convolution(
            codes, invalid, piece.weight, piece.weight_zero_point, *scaling, channel_add, residual, factor,
            self.size[1], list(self.stride), list(self.padding), list(self.dilation), self.parts, upsample, output,
            dtype,
        )  # fmt: skip


def channels_adjacent(x: Tensor, *, image: bool) -> Tensor:
    """View, or copy, x, float [B, C, H, W] or [B, ..., C], as [B, pixels, C] with adjacent channels."""
    if image:
        return x.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(1, 2)
    batch = x.shape[0] if x.dim() > 1 else 1
    return x.contiguous().view(batch, math.prod(x.shape[1:-1]), x.shape[-1])
