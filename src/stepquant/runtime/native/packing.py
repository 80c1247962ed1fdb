"""A layer's weight in the order in which the kernels multiply it."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from stepquant.core.dynamic import DynamicGrid
from stepquant.core.qtensor import QTensor, QuantizedLayer
from stepquant.layers.conv import QuantizedConv
from stepquant.layers.quantized import QuantizedModule
from stepquant.runtime.native.windows import Convolution


class Piece(NamedTuple):
    """Consecutive input channels whose products are one call: all of them if the activation is dynamic.

    Without a dynamic activation they have one weight scale per output and one activation scale, so there is one run.

    Attributes:
        start, channels: the input channels [start, start + channels).
        group: column of the activation table.
        taps, run: number of contiguous runs of bytes in a window, and bytes of a run.
        weight: int8, see `pack_columns`; with `zero_point`, uint8, see `pack_nibbles`.
        weight_sum: int32 [out, padded].
        largest: no weight is outside of -largest to largest.
        weight_scale: float32 [out, padded].
        zero_point: uint8 [runs, out, padded], if the weight is stored as codes of 4 bits.
        runs: structures `Run`, int64 [runs, 3].
        places: int64 [channels], where a run of `taps` has each channel; None: in order, for every tap.
        run_sum: float32 [taps, runs, out, padded], minus the sum of weights; only for dynamic activations.
        run_scale: float32 [runs, out, padded]; None if the runs share `weight_scale`.
        fours: of a piece, see `pack_columns`.
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
    runs: Tensor
    places: Tensor | None = None
    run_sum: Tensor | None = None
    run_scale: Tensor | None = None
    fours: int = 16

    def integers(self, out: int) -> Tensor:
        """int8 [out, taps, run], or [out, taps, channels] of a dynamic activation."""
        tiles = self.weight
        if self.zero_point is not None:
            tiles = unpack_nibbles(tiles, _by_piece(self.zero_point, self.runs), self.taps, self.fours)
        columns = unpack_columns(tiles, (out, self.taps, self.run))
        return columns if self.places is None else columns[..., self.places]


class PackedLayer(NamedTuple):
    """What the kernels read of a layer, apart from the activation table.

    Attributes:
        outputs: of a window: all phases of a transposed convolution.
        convolution: None for a linear.
        starts: int64, the first channel of the windows of each 32 outputs; None if windows have all channels.
        bias: float32 [out, padded], or None.
        smoothing: float32 [in], divides the input; its reciprocals for a dynamic activation; or None.
    """

    outputs: int
    inputs: int
    convolution: Convolution | None
    pieces: list[Piece]
    starts: Tensor | None
    bias: Tensor | None
    smoothing: Tensor | None
    dynamic: DynamicGrid | None

    @classmethod
    def of(cls, module: QuantizedModule, *, nibbles: bool, halves: bool) -> PackedLayer:
        """Pack a layer.

        Args:
            nibbles: two weights of up to 4 bits to a byte.
            halves: pieces of 32 bytes are possible, for channel groups that would not fill 64.
        """
        layer, convolution = module.layer(), None
        outputs, inputs = module.weight_shape[:2]
        assert layer.input is not None
        if isinstance(module, QuantizedConv):
            convolution = Convolution.of(module)
            outputs, inputs = outputs * math.prod(convolution.phases), module.in_channels
        bias = layer.bias
        nibbles = nibbles and layer.weight.bits <= 4
        smoothing, dynamic = layer.smoothing, layer.input if isinstance(layer.input, DynamicGrid) else None
        if dynamic is not None:
            pieces = [_pack_dynamic(convolution, nibbles, halves, layer, dynamic)]
            smoothing = None if smoothing is None else smoothing.reciprocal()
        else:
            pieces = [_pack(convolution, nibbles, *segment) for segment in layer.segments()]
        return cls(
            outputs,
            inputs,
            convolution,
            pieces,
            None if convolution is None else convolution.channel_starts(),
            None if bias is None else padded(bias.repeat(outputs // len(bias)), torch.float32),
            None if smoothing is None else smoothing.clone(),
            dynamic,
        )

    def integers(self) -> Tensor:
        """The weight as `QTensor.integers` has it: int8 [out, in, *kernel]."""
        parts = [piece.integers(self.outputs) for piece in self.pieces]
        if self.convolution is None:
            return torch.cat([part[:, 0] for part in parts], dim=1)
        size = self.convolution.window.size
        images = [part.reshape(self.outputs, *size, -1).permute(0, 4, 1, 2, 3) for part in parts]
        return torch.cat([self.convolution.integers(image) for image in images], dim=1)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that a call points into."""
        parts = [part for piece in self.pieces for part in piece if isinstance(part, Tensor)]
        return [x for x in (*parts, self.starts, self.bias, self.smoothing) if x is not None]


def _pack(convolution: Convolution | None, nibbles: bool, channels: slice, group: int, part: QTensor) -> Piece:
    """Pack channels of a weight. Without dilation a row of a window is one run of bytes."""
    weight = part.integers()
    taps = _taps(convolution, weight)
    repeats, groups = len(taps) // len(weight), 1 if convolution is None else convolution.groups
    if convolution is not None and convolution.rows_are_runs:
        taps = taps.reshape(len(taps), taps.shape[1] // convolution.window.size[2], -1)
    tiles, total = pack_columns(taps), taps.flatten(1).sum(1, dtype=torch.int32)
    zero_point = padded(part.grid.zero_point[0].repeat(1, repeats), torch.uint8) if nibbles else None
    runs = torch.tensor([[0, tiles.shape[2], 0]], device="cpu")
    return Piece(
        channels.start,
        (channels.stop - channels.start) * groups,
        group,
        taps.shape[1],
        taps.shape[2],
        tiles if zero_point is None else pack_nibbles(tiles, _by_piece(zero_point, runs)),
        padded(total, torch.int32),
        max(1, -int(weight.min()), int(weight.max())),
        padded(part.grid.scale[0, 0].repeat(repeats), torch.float32),
        zero_point,
        runs,
    )


def _taps(convolution: Convolution | None, weight: Tensor) -> Tensor:
    """int8 [out, in / groups, *kernel] -> [outputs of a window, taps, channels of a window]."""
    return weight[:, None] if convolution is None else convolution.windowed(weight).permute(0, 2, 3, 4, 1).flatten(1, 3)


def _pack_dynamic(
    convolution: Convolution | None, nibbles: bool, halves: bool, layer: QuantizedLayer, grid: DynamicGrid
) -> Piece:
    """Pack all of a weight. Each run begins with a new piece: channels of one weight scale and one activation scale."""
    weight, grids = layer.weight.integers(), layer.weight.grid
    channels = weight.shape[1]
    group = min(grid.group or channels, channels)
    weight_ends = list(accumulate(grids.sizes(channels)))
    ends = sorted({*weight_ends, *range(group, channels, group), channels})
    starts = [0, *ends[:-1]]
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    fours = 8 if halves and sum(-size % 64 >= 32 for size in sizes) * 4 > len(sizes) else 16
    pieces = [-(-size // (4 * fours)) for size in sizes]
    firsts = [4 * fours * count for count in accumulate([0, *pieces[:-1]])]
    places = torch.cat(
        [torch.arange(first, first + size, device="cpu") for first, size in zip(firsts, sizes, strict=True)]
    )
    taps = _taps(convolution, weight)
    repeats = len(taps) // len(weight)
    spread = taps.new_zeros(*taps.shape[:2], sum(pieces) * 4 * fours)
    spread[..., places] = taps
    of_weight = [next(index for index, stop in enumerate(weight_ends) if end <= stop) for end in ends]
    runs = torch.tensor(
        [[start, count, start // group] for start, count in zip(starts, pieces, strict=True)], device="cpu"
    )
    sums = [-part.sum(2, dtype=torch.float32).t() for part in taps.split(sizes, dim=2)]  # [taps, out]
    zero_point = padded(grids.zero_point[0, of_weight].repeat(1, repeats), torch.uint8) if nibbles else None
    tiles = pack_columns(spread, fours)
    several, scale = len(weight_ends) > 1, grids.scale[0, of_weight].repeat(1, repeats)
    return Piece(
        0,
        channels,
        0,
        taps.shape[1],
        spread.shape[2],
        tiles if zero_point is None else pack_nibbles(tiles, _by_piece(zero_point, runs)),
        padded(taps.flatten(1).sum(1, dtype=torch.int32), torch.int32),
        max(1, -int(weight.min()), int(weight.max())),
        padded(torch.ones_like(scale[0]) if several else scale[0], torch.float32),
        zero_point,
        runs,
        places,
        padded(torch.stack(sums, dim=1), torch.float32),
        padded(scale, torch.float32) if several else None,
        fours,
    )


def pack_columns(weight: Tensor, fours: int = 16) -> Tensor:
    """int8 [out, taps, run] -> tiles of ``product.h``: int8 [tiles of 16 outputs, even; taps; pieces; fours; 16; 4]."""
    out, taps, run = weight.shape
    tiles, pieces = (out + 31) // 32 * 2, -(-run // (4 * fours))
    padded = weight.new_zeros(tiles * 16, taps, pieces * 4 * fours)
    padded[:out, :, :run] = weight
    return padded.view(tiles, 16, taps, pieces, fours, 4).permute(0, 2, 3, 4, 1, 5).contiguous()


def unpack_columns(tiles: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Inverse of `pack_columns`: int8 of `shape`, [out, taps, run]."""
    out, taps, run = shape
    return tiles.permute(0, 4, 1, 2, 3, 5).reshape(tiles.shape[0] * 16, taps, -1)[:out, :, :run]


def pack_nibbles(tiles: Tensor, zero_point: Tensor) -> Tensor:
    """Pack tiles of `pack_columns` as codes of 4 bits, weight + zero point.

    Byte i of each 32 holds the codes of weights i (low bits) and i + 32 (high bits) of 64.

    Args:
        tiles: int8, from `pack_columns`.
        zero_point: int8, see `_by_piece`.
    """
    codes = (tiles + zero_point).view(torch.uint8).view(-1, 2, 32)
    return codes[:, 0] | (codes[:, 1] << 4)


def unpack_nibbles(nibbles: Tensor, zero_point: Tensor, taps: int, fours: int) -> Tensor:
    """Inverse of `pack_nibbles`."""
    codes = torch.stack([nibbles & 0xF, nibbles >> 4], dim=1).view(torch.int8)
    return codes.view(len(zero_point), taps, -1, fours, 16, 4) - zero_point


def _by_piece(zero_point: Tensor, runs: Tensor) -> Tensor:
    """uint8 [runs, out, padded] -> int8, to broadcast against tiles of `pack_columns`."""
    pieces = zero_point.view(torch.int8).repeat_interleave(runs[:, 1], dim=0)
    return pieces.view(len(pieces), -1, 16).transpose(0, 1)[:, None, :, None, :, None]


def padded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., out] -> [..., out rounded up to 32], filled up with 0."""
    result = torch.zeros(*values.shape[:-1], (values.shape[-1] + 31) // 32 * 32, dtype=dtype, device=values.device)
    result[..., : values.shape[-1]] = values
    return result
