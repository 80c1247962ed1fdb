"""What is the same in every call of a layer with inputs of one form: checked and computed once, then reused."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stepquant.errors import StepquantError
from stepquant.runtime.native.library import ACTIVATIONS, TYPES, Call, Grids, Layer, Plane, Positions, Source
from stepquant.runtime.native.memory import aligned
from stepquant.runtime.native.norms import check_channels
from stepquant.runtime.native.packing import PackedLayer, Piece
from stepquant.runtime.native.windows import Sizes, Window

Form = tuple[torch.Size, torch.dtype, bool, bool]
"""Shape and dtype of a tensor, whether it is contiguous, and whether it is in main memory."""


def form(x: Tensor) -> Form:
    """The form of a tensor."""
    return x.shape, x.dtype, x.is_contiguous(), x.is_cpu


class Request(NamedTuple):
    """Everything about the arguments of `NativeKernel.run` that a plan depends on.

    Attributes:
        shape, stride, x_dtype: of x.
        dtype: of the result.
        per_step: whether samples may be at different rows of the activation table.
        multiply, add, epsilon: of the normalization.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    x_dtype: torch.dtype
    dtype: torch.dtype
    per_step: bool
    multiply: Form | None
    add: Form | None
    epsilon: float | None
    channel_add: Form | None
    gate: Form | None
    residual: Form | None
    activation: str | None
    upsample: int
    extra: int
    factor: float
    threads: int

    @property
    def several_norms(self) -> bool:
        """Whether each sample has its own normalization."""
        return self.multiply is not None and self.multiply[0][0] > 1

    @property
    def per_sample(self) -> bool:
        """Whether samples differ in more than their values."""
        return self.per_step or self.several_norms or self.channel_add is not None or self.gate is not None


class Geometry(NamedTuple):
    """How the codes of one input shape are stored, and where the windows of the outputs start.

    Attributes:
        plane, grids, positions: structures for the kernels.
        taps: int64 [runs of a window], byte offsets.
        bytes: of the codes and what follows them: flags of images, and dynamic grids.
        output: frames, height and width.
    """

    plane: Any
    grids: Any
    positions: Any
    taps: Tensor
    bytes: int
    output: Sizes


class Plan(NamedTuple):
    """The fixed part of a layer's calls.

    Attributes:
        calls: for each piece, a `Call` without the addresses of one call; `geometries` keeps what it points into alive.
        offsets: for each piece, bytes from x to its first channel.
        shape, memory_format, dtype: of the output.
        batch: number of samples with separate rows; 1 where all samples share one.
    """

    calls: list[Any]
    offsets: list[int]
    geometries: list[Geometry]
    shape: tuple[int, ...]
    memory_format: torch.memory_format
    dtype: torch.dtype
    batch: int


def make_plan(layer: PackedLayer, request: Request, extension: int) -> Plan:
    """Check a request and plan its calls.

    Raises:
        StepquantError: if an argument does not fit the layer or x.
    """
    shape, convolution = request.shape, layer.convolution
    channels = layer.inputs * (2 if request.activation == "geglu" else 1)
    check_channels(shape, shape[-1 if convolution is None else 1], channels)
    if convolution is None and request.per_sample and len(shape) < 2:
        raise StepquantError(f"a layer was given an input of shape {list(shape)}; expected [B, ..., in].")
    if convolution is not None:
        missing = (1,) * (3 - convolution.dims)
        batch, (frames, height, width) = shape[0], (*missing, *shape[2:])
        size: Sizes = (frames, height * request.upsample, width * request.upsample)
        strides = (request.stride[0], *missing, *request.stride[2:])
    else:
        batch = shape[0] if request.per_sample else 1
        size = (1, 1, shape.numel() // max(1, batch * shape[-1]))
        strides = (size[2] * shape[-1], 0, 0, shape[-1])
    geometries = [_geometry(layer, piece, batch, size, request.extra) for piece in layer.pieces]
    if convolution is None:
        output = (*shape[:-1], layer.outputs)
    else:
        output = (shape[0], layer.outputs, *geometries[0].output[min(1, 3 - convolution.dims) :])
    if any(size < 1 for size in geometries[0].output) and 0 not in shape:
        raise StepquantError(f"a layer was given an image of shape {list(shape)}; expected one as large as its window.")
    _check(layer, request, batch, output)
    calls = []
    for index, (piece, geometry) in enumerate(zip(layer.pieces, geometries, strict=True)):
        first, last = index == 0, index == len(layer.pieces) - 1
        residual_type = TYPES[request.residual[1]] if first and request.residual is not None else 0
        bias = layer.bias if first else None
        calls.append(Call(
            smoothing=None if layer.smoothing is None else layer.smoothing.data_ptr() + 4 * piece.start,
            source=Source(
                TYPES[request.x_dtype], request.upsample, *strides, batch, *size, piece.channels, layer.inputs
            ),
            plane=geometry.plane,
            grids=geometry.grids,
            layer=Layer(
                piece.weight.data_ptr(), _address(piece.zero_point), piece.weight_sum.data_ptr(),
                piece.weight_scale.data_ptr(), _address(bias), geometry.taps.data_ptr(), _address(layer.starts),
                piece.runs.data_ptr(), _address(piece.run_sum), _address(piece.run_scale),
                len(geometry.taps), len(piece.runs), -(-piece.run // (4 * piece.fours)), layer.outputs, piece.fours,
                piece.largest,
            ),
            positions=geometry.positions,
            per_sample=request.per_step,
            norm_image=layer.inputs if request.several_norms else 0, epsilon=request.epsilon or 0.0,
            activation=ACTIVATIONS[request.activation],
            y_type=TYPES[request.dtype if last else torch.float32], residual_type=residual_type,
            factor=request.factor if last else 1.0, extension=extension, threads=request.threads,
        ))  # fmt: skip
    itemsize = request.x_dtype.itemsize
    layout = torch.contiguous_format
    if convolution is not None:
        layout = torch.channels_last_3d if convolution.dims == 3 else torch.channels_last
    offsets = [piece.start * itemsize for piece in layer.pieces]
    return Plan(calls, offsets, geometries, output, layout, request.dtype, batch)


def _check(layer: PackedLayer, request: Request, batch: int, output: tuple[int, ...]) -> None:
    """Raise `StepquantError` for arguments that the kernels would read past the end of, or misread."""
    inputs = {"normalization scale": request.multiply, "normalization shift": request.add}
    outputs = {"added tensor": request.channel_add, "gate": request.gate}
    for vectors, channels in ((inputs, layer.inputs), (outputs, layer.outputs)):
        fitting = [((rows, channels), torch.float32, True, True) for rows in (1, batch)]
        for name, given in vectors.items():
            if given is not None and given not in fitting:
                raise StepquantError(
                    f"the {name} of a layer is {_described(given)}; expected contiguous float32 [{batch}, {channels}] "
                    f"or [1, {channels}] on cpu."
                )
    if request.multiply is not None and request.add is not None and request.multiply[0] != request.add[0]:
        raise StepquantError(
            f"a normalization has a scale {list(request.multiply[0])} and a shift {list(request.add[0])}; expected one "
            "shape."
        )
    if request.residual is not None and (request.residual[0] != output or not request.residual[3]):
        raise StepquantError(
            f"the residual is {_described(request.residual)}; expected {list(output)}, like the output, on cpu."
        )
    if request.epsilon and len(layer.pieces) > 1:
        raise StepquantError("a layer normalization was fused into a layer of channel groups; expected one group.")
    normalized = request.multiply is not None
    activations = (None,) if request.epsilon else (None, "silu") if normalized else tuple(ACTIVATIONS)
    if request.activation not in activations:
        place = " after this normalization" if normalized else ""
        raise StepquantError(f"activation is {request.activation!r}; expected one of {list(activations)}{place}.")
    if request.upsample not in (1, 2):
        raise StepquantError(f"upsample is {request.upsample}; expected 1 or 2.")


def _described(given: Form) -> str:
    shape, dtype, contiguous, on_cpu = given
    parts = [str(dtype).removeprefix("torch."), str(list(shape))]
    parts += [] if contiguous else ["with gaps"]
    return " ".join(parts + ([] if on_cpu else ["on another device"]))


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _geometry(layer: PackedLayer, piece: Piece, batch: int, size: Sizes, extra: int) -> Geometry:
    convolution, dynamic = layer.convolution, layer.dynamic
    window = Window() if convolution is None else convolution.window
    (kt, kh, kw), (st, sh, sw), (dt, dh, dw) = window.size, window.stride, window.dilation
    after = (window.after[0], window.after[1] + extra, window.after[2] + extra)
    border = [max(0, count) for count in after]
    # The gap between two rows is the right border of one and the left border of the next.
    pixels = size[2] + max(window.before[2], border[2])
    rows = size[1] + window.before[1] + border[1]
    frame = rows * pixels * piece.channels
    image = window.before[2] * piece.channels + (size[0] + window.before[0] + border[0]) * frame
    frames, height, width = (
        (size[i] + window.before[i] + after[i] - window.dilation[i] * (window.size[i] - 1) - 1) // window.stride[i] + 1
        for i in range(3)
    )
    rows_are_runs = dynamic is None and (convolution is None or convolution.rows_are_runs)
    columns = [0] if rows_are_runs else [x * dw for x in range(kw)]
    taps = [
        t * dt * frame + (y * dh * pixels + x) * piece.channels for t in range(kt) for y in range(kh) for x in columns
    ]
    # Tiles of 16 outputs end with the row or continue across the gap, whichever wastes less.
    flat = pixels if sh == sw and (height * pixels + 15) // 16 < height * ((width + 15) // 16) else 0
    step = sw * piece.channels
    # The last tile reads up to 15 rows past the end, and a row up to 63 bytes; then a flag for each image.
    codes = batch * image + (16 + pixels) * step + 64
    scale, groups, group = aligned(codes + batch), 0, 0
    if dynamic is not None:
        group = dynamic.group or piece.channels
        groups = -(-piece.channels // group)
    zero_point = aligned(scale + 4 * groups * (codes // piece.channels + 1))
    return Geometry(
        Plane(image, pixels, window.before[0], border[0], window.before[1], border[1], window.before[2], codes),
        Grids(group, groups, scale, zero_point),
        Positions(batch, frames, image, st * frame, sh * pixels * piece.channels, step, height, width, flat),
        torch.tensor(taps, dtype=torch.int64, device="cpu"),
        2 * zero_point - scale,
        (frames, height, width),
    )
