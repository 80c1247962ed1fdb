"""A linear or convolution in integers: codes are made in one pass, multiplied, and scaled as they are stored."""

from __future__ import annotations

from ctypes import byref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepquant.core.affine import largest_code
from stepquant.core.qtensor import QTensor
from stepquant.errors import StepquantError
from stepquant.layers.clock import of_samples
from stepquant.layers.conv import QuantizedConv2d
from stepquant.layers.kernel import Kernel, opaque
from stepquant.layers.quantized import QuantizedModule
from stepquant.runtime.native.build import has_amx, library
from stepquant.runtime.native.library import (
    ACTIVATIONS,
    TYPES,
    Call,
    Layer,
    Plane,
    Positions,
    Source,
    pack_columns,
    pack_nibbles,
    padded,
    unpack_columns,
    unpack_nibbles,
)
from stepquant.runtime.native.memory import scratch
from stepquant.runtime.native.norms import Norm, check_channels, dense, group_norm
from stepquant.runtime.native.recording import record

MOST_PLANS = 32
"""Plans that a layer keeps, of inputs of different shapes; the oldest is forgotten for the next."""


class Piece(NamedTuple):
    """Input channels with one weight scale and one activation scale, packed.

    Attributes:
        start, channels: which input channels.
        group: column of the activation table.
        taps, run: pieces of a window, and bytes of each that are adjacent in memory.
        weight: int8 tiles, see `pack_columns`; weight_sum: int32 and weight_scale: float32, [out] padded.
        zero_point: uint8 [out] padded, where the weight is held as codes of 4 bits, see `pack_nibbles`; else None.
    """

    start: int
    channels: int
    group: int
    taps: int
    run: int
    weight: Tensor
    weight_sum: Tensor
    weight_scale: Tensor
    zero_point: Tensor | None

    def integers(self, out: int) -> Tensor:
        """int8 [out, taps, run]."""
        tiles = self.weight
        if self.zero_point is not None:
            tiles = unpack_nibbles(tiles, self.zero_point, self.taps)
        return unpack_columns(tiles, (out, self.taps, self.run))


class Geometry(NamedTuple):
    """How the codes of one input shape lie in memory, and where the windows of the outputs start.

    Attributes:
        plane, positions: structures for the kernels.
        taps: int64, offset of each run of a window.
        bytes: of the codes.
        output: height and width.
    """

    plane: Any
    positions: Any
    taps: Tensor
    bytes: int
    output: tuple[int, int]


class Plan(NamedTuple):
    """What is the same in every call with inputs of one shape, layout and type: of one piece, or of all.

    Attributes:
        calls: for each piece, a `Call` without the addresses of this call; kept alive by `geometries`.
        offsets: for each piece, bytes from x to its first channel.
        shape: of the output; `memory_format` and `dtype` of it.
        batch: samples that have values of their own.
    """

    calls: list[Any]
    offsets: list[int]
    geometries: list[Geometry]
    shape: tuple[int, ...]
    memory_format: torch.memory_format
    dtype: torch.dtype
    batch: int


class NativeKernel(Kernel):
    """One layer. `forward` is the layer alone; `run` has what can be fused with it.

    No code stands for NaN: it becomes the smallest code, 0, and so a finite output, where the reference puts out NaN.

    Args:
        packed: hold weights of up to 4 bits as codes, two to a byte, which are unpacked some columns at a time as they
            are multiplied; results are the same.
    """

    fuses = True
    group_norm = staticmethod(group_norm)

    def __init__(self, module: QuantizedModule, *, amx: bool | None = None, packed: bool = False) -> None:
        super().__init__()
        layer = module.layer()
        assert layer.input is not None
        self.library = library()
        self.amx = int(has_amx() if amx is None else amx)
        self.outputs, self.inputs = module.weight_shape[:2]
        self.is_convolution = isinstance(module, QuantizedConv2d)
        self.kernel_size: tuple[int, int] = (1, 1)
        self.stride: tuple[int, int] = (1, 1)
        self.padding: tuple[int, int] = (0, 0)
        self.dilation: tuple[int, int] = (1, 1)
        if isinstance(module, QuantizedConv2d):
            self.kernel_size = (module.weight_shape[2], module.weight_shape[3])
            self.stride, self.padding, self.dilation = module.stride, module.padding, module.dilation
        self.scale = layer.input.scale.squeeze(2).clone()
        self.zero_point = layer.input.zero_point.squeeze(2).int()
        self.smoothing = None if layer.smoothing is None else layer.smoothing.clone()
        self.top = largest_code(layer.input.bits)
        self.rows, self.groups = self.scale.shape
        self.by_row = [self.scale, self.zero_point]
        self.bias = None if layer.bias is None else padded(layer.bias, torch.float32)
        self.packed = packed and layer.weight.bits <= 4
        self.pieces = [self._pack(*segment) for segment in layer.segments()]
        self.plans: dict[tuple[Any, ...], Plan] = {}

    @property
    def whole(self) -> bool:
        """Whether all input channels are one piece, so that a pass over codes sees every channel of a position."""
        return len(self.pieces) == 1

    @property
    def lasting(self) -> list[Tensor]:
        """What calls point into that is the same in all of them."""
        taps = [geometry.taps for plan in list(self.plans.values()) for geometry in plan.geometries]
        packed = [part for piece in self.pieces for part in piece if isinstance(part, Tensor)]
        return [x for x in (*self.by_row, *packed, *taps, self.smoothing, self.bias) if x is not None]

    def _pack(self, channels: slice, group: int, part: QTensor) -> Piece:
        """A row of taps is one run of bytes where it can be."""
        weight = part.integers()
        taps = weight[:, None] if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1, 2)
        if weight.dim() == 4 and self.dilation[1] == 1:
            taps = taps.reshape(weight.shape[0], weight.shape[2], -1)
        tiles, total = pack_columns(taps), weight.flatten(1).sum(1, dtype=torch.int32)
        zero_point = padded(part.grid.zero_point[0, 0], torch.uint8) if self.packed else None
        return Piece(
            channels.start,
            channels.stop - channels.start,
            group,
            taps.shape[1],
            taps.shape[2],
            tiles if zero_point is None else pack_nibbles(tiles, zero_point),
            padded(total, torch.int32),
            padded(part.grid.scale[0, 0], torch.float32),
            zero_point,
        )

    def integers(self) -> Tensor:
        """The weight that the kernel holds, as `QTensor.integers` has it."""
        parts = [piece.integers(self.outputs) for piece in self.pieces]
        if not self.is_convolution:
            return torch.cat([part[:, 0] for part in parts], dim=1)
        images = [
            part.reshape(self.outputs, *self.kernel_size, piece.channels).permute(0, 3, 1, 2)
            for part, piece in zip(parts, self.pieces, strict=True)
        ]
        return torch.cat(images, dim=1)

    @opaque
    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        return self.run(x, row)

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
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        factor: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``((layer(upsample(activation(norm(x)))) + channel_add) * gate + residual) * factor``.

        Args:
            x: float [B, C, H, W], or [B, ..., in] for a linear; [B, N, in] with what is of each sample. With ``geglu``
                the last dimension is 2 in.
            norm: one with an epsilon only where `whole`.
            activation: one of `ACTIVATIONS`; after a normalization only ``silu``, and that of a group normalization.
            upsample: 2 repeats every pixel in both directions.
            extra: rows and columns of zeros below and to the right of the image, besides the padding.
            channel_add, gate: float32 [B, out] or [1, out], contiguous.
            residual: float, of the output's shape; copied unless it is channels-last, or contiguous for a linear.
            dtype: of the result; by default that of x. In float64 it is the one of float32.

        Raises:
            StepquantError: if x has another number of channels or dimensions than the layer is for, or is not in the
                processor's memory; if it is no multiple of the samples that `row` is of.
        """
        wanted = dtype or x.dtype
        dtype = wanted if wanted in TYPES else torch.float32
        if residual is not None and residual.dtype not in TYPES:
            residual = residual.float()
        x = dense(x, image=self.is_convolution)
        several = (
            row.dim() == 1 and self.rows > 1,
            norm is not None and len(norm.multiply) > 1,
            channel_add is not None or gate is not None,
        )
        key = (
            x.shape, x.stride(), x.dtype, dtype, None if residual is None else residual.dtype, several,
            None if norm is None else norm.epsilon, activation, upsample, extra, factor, torch.get_num_threads(),
        )  # fmt: skip
        plan = self.plans.get(key)
        if plan is None:
            plan = self._plan(*key)
            if len(self.plans) >= MOST_PLANS:
                self.plans.pop(next(iter(self.plans.copy())), None)  # copied: other threads add to it, too
            self.plans[key] = plan
        if several[1] and norm is not None and len(norm.multiply) != plan.batch:
            raise StepquantError(
                f"a batch of {plan.batch} was given the normalizations of {len(norm.multiply)} samples."
            )
        if residual is not None:
            residual = residual.contiguous(memory_format=plan.memory_format)
        if several[2]:
            channel_add, gate = (_of_each(values, plan.batch) for values in (channel_add, gate))
        y = torch.empty(plan.shape, dtype=plan.dtype, device="cpu", memory_format=plan.memory_format)
        sums = y if self.whole or dtype == torch.float32 else torch.empty_like(y, dtype=torch.float32)
        scale, zero_point, step, keep = self._grid(row, plan.batch, several[0])
        for index, piece in enumerate(self.pieces):
            call = Call.from_buffer_copy(plan.calls[index])
            call.x = x.data_ptr() + plan.offsets[index]
            call.scale, call.zero_point = scale + piece.group * step, zero_point + piece.group * step
            call.codes = scratch("codes", plan.geometries[index].bytes)
            call.y = (y if index == len(self.pieces) - 1 else sums).data_ptr()
            if norm is not None:
                call.multiply = norm.multiply.data_ptr() + 4 * piece.start
                call.add = norm.add.data_ptr() + 4 * piece.start
            if gate is not None:
                call.gate = gate.data_ptr()
            if index > 0:
                call.residual = sums.data_ptr()
            else:
                if channel_add is not None:
                    call.channel_add = channel_add.data_ptr()
                if residual is not None:
                    call.residual = residual.data_ptr()
            self.library.sq_codes(byref(call))
            self.library.sq_layer(byref(call))
            record(call, plan.geometries[index].bytes)
        del keep
        return y if dtype is wanted else y.to(wanted)

    def _grid(self, row: Tensor, batch: int, per_sample: bool) -> tuple[int, int, int, Any]:
        """Addresses of the first group's scale and zero point, bytes to the next group's, and what they point into."""
        if not per_sample:
            at = (0 if self.rows == 1 else int(row)) * self.groups * 4
            return self.scale.data_ptr() + at, self.zero_point.data_ptr() + at, 4, None
        rows = of_samples(row, batch)
        tables = [values[rows].t().contiguous() for values in (self.scale, self.zero_point)]
        return tables[0].data_ptr(), tables[1].data_ptr(), 4 * batch, tables

    def _plan(
        self,
        shape: torch.Size,
        stride: tuple[int, ...],
        x_type: torch.dtype,
        dtype: torch.dtype,
        residual_type: torch.dtype | None,
        several: tuple[bool, bool, bool],
        epsilon: float | None,
        activation: str | None,
        upsample: int,
        extra: int,
        factor: float,
        threads: int,
    ) -> Plan:
        check_channels(
            shape, shape[1 if self.is_convolution else -1], self.inputs * (2 if activation == "geglu" else 1)
        )
        if any(several) and len(shape) < 2:
            raise StepquantError(f"a layer was given an input of shape {list(shape)}: expected [B, ..., in].")
        if self.is_convolution:
            batch, height, width = shape[0], shape[2] * upsample, shape[3] * upsample
            strides = (stride[0], stride[2], stride[3])
        else:
            batch, height = (shape[0] if any(several) else 1), 1
            width = shape.numel() // max(1, batch * shape[-1])
            strides = (width * shape[-1], 0, shape[-1])
        geometries = [self._geometry(piece, batch, height, width, extra) for piece in self.pieces]
        calls = []
        for index, (piece, geometry) in enumerate(zip(self.pieces, geometries, strict=True)):
            first, last = index == 0, index == len(self.pieces) - 1
            other = residual_type if first else torch.float32
            bias = self.bias if first else None
            calls.append(Call(
                smoothing=None if self.smoothing is None else self.smoothing.data_ptr() + 4 * piece.start,
                source=Source(
                    TYPES[x_type], upsample, *strides, batch, height, width, piece.channels, self.inputs
                ),
                plane=geometry.plane,
                layer=Layer(
                    piece.weight.data_ptr(), None if piece.zero_point is None else piece.zero_point.data_ptr(),
                    piece.weight_sum.data_ptr(), piece.weight_scale.data_ptr(),
                    None if bias is None else bias.data_ptr(), geometry.taps.data_ptr(), len(geometry.taps),
                    (piece.run + 63) // 64, self.outputs,
                ),
                positions=geometry.positions,
                per_sample=several[0], top=self.top,
                norm_image=self.inputs if several[1] else 0, epsilon=epsilon or 0.0,
                activation=ACTIVATIONS[activation],
                y_type=TYPES[dtype if last else torch.float32], residual_type=0 if other is None else TYPES[other],
                factor=factor if last else 1.0, amx=self.amx, threads=threads,
            ))  # fmt: skip
        size = torch.finfo(x_type).bits // 8
        output = (shape[0], self.outputs, *geometries[0].output) if self.is_convolution else (*shape[:-1], self.outputs)
        layout = torch.channels_last if self.is_convolution else torch.contiguous_format
        return Plan(calls, [piece.start * size for piece in self.pieces], geometries, output, layout, dtype, batch)

    def _geometry(self, piece: Piece, batch: int, height: int, width: int, extra: int) -> Geometry:
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = self.kernel_size, self.stride, self.padding, self.dilation
        # The gap between two rows is the right border of one and the left border of the next.
        pixels = width + pw + extra
        rows = height + 2 * ph + extra
        image = (pw + rows * pixels) * piece.channels
        out_height = (rows - dh * (kh - 1) - 1) // sh + 1
        out_width = (width + 2 * pw + extra - dw * (kw - 1) - 1) // sw + 1
        if dw == 1:
            taps = [y * dh * pixels * piece.channels for y in range(kh)]
        else:
            taps = [(y * dh * pixels + x * dw) * piece.channels for y in range(kh) for x in range(kw)]
        # Tiles of 16 outputs end with the row, or run on across the gap, whichever wastes less.
        flat = pixels if sh == sw and (out_height * pixels + 15) // 16 < out_height * ((out_width + 15) // 16) else 0
        step = sw * piece.channels
        table = torch.tensor(taps, dtype=torch.int64, device="cpu")
        return Geometry(
            Plane(image, pixels, ph, ph + extra, pw),
            Positions(batch, image, sh * pixels * piece.channels, step, out_height, out_width, flat),
            table,
            # The last tile reads up to 15 rows past the end, and a row up to 63 bytes.
            batch * image + (16 + pixels) * step + 64,
            (out_height, out_width),
        )


def _of_each(values: Tensor | None, batch: int) -> Tensor | None:
    """[B, C] or [1, C] -> [B, C]."""
    return values if values is None or len(values) == batch else values.expand(batch, -1).contiguous()


def is_native(module: Any) -> bool:
    """Whether `module` is a layer with a kernel of this runtime."""
    return isinstance(module, QuantizedModule) and isinstance(module.kernel, NativeKernel)
