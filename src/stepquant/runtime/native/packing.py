"""A layer's weight in the order in which the kernels multiply it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stepquant.core.qtensor import QTensor
from stepquant.layers.conv import QuantizedConv2d
from stepquant.layers.quantized import QuantizedModule


class Window(NamedTuple):
    """Geometry of a convolution: height and width each."""

    size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


class Piece(NamedTuple):
    """Consecutive input channels with one weight scale per output and one activation scale, packed.

    Attributes:
        start, channels: the input channels [start, start + channels).
        group: column of the activation table.
        taps, run: number of contiguous runs of bytes in a window, and bytes of a run.
        weight: int8, see `pack_columns`; with `zero_point`, uint8, see `pack_nibbles`.
        weight_sum: int32 [out, padded].
        largest: no weight is outside of -largest to largest.
        weight_scale: float32 [out, padded].
        zero_point: uint8 [out, padded], if the weight is stored as codes of 4 bits.
    """

    start: int
    channels: int
    group: int
    taps: int
    run: int
    weight: Tensor
    weight_sum: Tensor
    largest: int
    weight_scale: Tensor
    zero_point: Tensor | None

    def integers(self, out: int) -> Tensor:
        """int8 [out, taps, run]."""
        tiles = self.weight
        if self.zero_point is not None:
            tiles = unpack_nibbles(tiles, self.zero_point, self.taps)
        return unpack_columns(tiles, (out, self.taps, self.run))


class PackedLayer(NamedTuple):
    """What the kernels read of a layer, apart from the activation table.

    Attributes:
        window: of a convolution; None for a linear.
        bias: float32 [out, padded], or None.
        smoothing: float32 [in], divides the input; or None.
    """

    outputs: int
    inputs: int
    window: Window | None
    pieces: list[Piece]
    bias: Tensor | None
    smoothing: Tensor | None

    @classmethod
    def of(cls, module: QuantizedModule, *, nibbles: bool) -> PackedLayer:
        """Pack a layer; `nibbles`: two weights of up to 4 bits to a byte."""
        layer, window = module.layer(), None
        outputs, inputs = module.weight_shape[:2]
        assert layer.input is not None
        if isinstance(module, QuantizedConv2d):
            size = (module.weight_shape[2], module.weight_shape[3])
            window = Window(size, module.stride, module.padding, module.dilation)
        nibbles = nibbles and layer.weight.bits <= 4
        return cls(
            outputs,
            inputs,
            window,
            [_pack(window, nibbles, *segment) for segment in layer.segments()],
            None if layer.bias is None else padded(layer.bias, torch.float32),
            None if layer.smoothing is None else layer.smoothing.clone(),
        )

    def integers(self) -> Tensor:
        """The weight as `QTensor.integers` has it: int8 [out, in, *kernel]."""
        parts = [piece.integers(self.outputs) for piece in self.pieces]
        if self.window is None:
            return torch.cat([part[:, 0] for part in parts], dim=1)
        images = [
            part.reshape(self.outputs, *self.window.size, piece.channels).permute(0, 3, 1, 2)
            for part, piece in zip(parts, self.pieces, strict=True)
        ]
        return torch.cat(images, dim=1)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that a call points into."""
        parts = [part for piece in self.pieces for part in piece if isinstance(part, Tensor)]
        return [x for x in (*parts, self.bias, self.smoothing) if x is not None]


def _pack(window: Window | None, nibbles: bool, channels: slice, group: int, part: QTensor) -> Piece:
    """Pack channels of a weight. Without dilation a row of a window is one run of bytes."""
    weight = part.integers()
    taps = weight[:, None] if window is None else weight.permute(0, 2, 3, 1).flatten(1, 2)
    if window is not None and window.dilation[1] == 1:
        taps = taps.reshape(weight.shape[0], weight.shape[2], -1)
    tiles, total = pack_columns(taps), weight.flatten(1).sum(1, dtype=torch.int32)
    zero_point = padded(part.grid.zero_point[0, 0], torch.uint8) if nibbles else None
    return Piece(
        channels.start,
        channels.stop - channels.start,
        group,
        taps.shape[1],
        taps.shape[2],
        tiles if zero_point is None else pack_nibbles(tiles, zero_point),
        padded(total, torch.int32),
        max(1, -int(weight.min()), int(weight.max())),
        padded(part.grid.scale[0, 0], torch.float32),
        zero_point,
    )


def pack_columns(weight: Tensor) -> Tensor:
    """int8 [out, taps, run] -> tiles of ``product.h``: int8 [tiles of 16 outputs, even; taps; pieces; 16; 16; 4]."""
    out, taps, run = weight.shape
    tiles, pieces = (out + 31) // 32 * 2, (run + 63) // 64
    padded = weight.new_zeros(tiles * 16, taps, pieces * 64)
    padded[:out, :, :run] = weight
    return padded.view(tiles, 16, taps, pieces, 16, 4).permute(0, 2, 3, 4, 1, 5).contiguous()


def unpack_columns(tiles: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Inverse of `pack_columns`: int8 of `shape`, [out, taps, run]."""
    out, taps, run = shape
    return tiles.permute(0, 4, 1, 2, 3, 5).reshape(tiles.shape[0] * 16, taps, -1)[:out, :, :run]


def pack_nibbles(tiles: Tensor, zero_point: Tensor) -> Tensor:
    """Pack tiles of `pack_columns` as codes of 4 bits, weight + zero point.

    Byte i of each 32 holds the codes of weights i (low bits) and i + 32 (high bits) of 64.

    Args:
        tiles: int8, from `pack_columns`.
        zero_point: uint8 [tiles * 16], one per column.
    """
    codes = (tiles + zero_point.view(torch.int8).view(-1, 1, 1, 1, 16, 1)).view(torch.uint8).view(-1, 2, 32)
    return codes[:, 0] | (codes[:, 1] << 4)


def unpack_nibbles(nibbles: Tensor, zero_point: Tensor, taps: int) -> Tensor:
    """Inverse of `pack_nibbles`."""
    codes = torch.stack([nibbles & 0xF, nibbles >> 4], dim=1).view(torch.int8)
    tiles = codes.view(zero_point.shape[0] // 16, taps, -1, 16, 16, 4)
    return tiles - zero_point.view(torch.int8).view(-1, 1, 1, 1, 16, 1)


def padded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[out] -> [out rounded up to 32], filled up with 0."""
    result = torch.zeros((values.shape[0] + 31) // 32 * 32, dtype=dtype, device=values.device)
    result[: values.shape[0]] = values
    return result
