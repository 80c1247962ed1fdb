"""ONNX export: a network in integer operations with per-step scales, and a denoiser that runs it by onnxruntime.

    codes = QuantizeLinear(x * (1 / s_t), 1, z_t)              s_t, z_t: row of the layer's tables at step t
    y = MatMulInteger(codes, w, z_t) * (s_t * s_w) + bias      one fused kernel of onnxruntime

Codes are those of `core.affine` and sums are exact. A convolution is a matrix product of the windows of its codes,
with channels last. The alternatives are slower: with QuantizeLinear and DequantizeLinear around a convolution,
onnxruntime uses integers only if the output is rounded to 8 bits as well; and its ConvInteger has no fast kernel for
signed weights.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.core.affine import largest_code
from stepquant.core.qtensor import Grid
from stepquant.errors import StepquantError, first_line
from stepquant.export.network import ExportedDenoiser, Traceable, batched, import_optional, traced_values
from stepquant.files import write_atomic
from stepquant.layers.attention import AttentionKernel, QuantizedAttentionProcessor
from stepquant.layers.conv import QuantizedConv2d, linear_map
from stepquant.layers.format import OPERANDS
from stepquant.layers.kernel import UNLIMITED, Capabilities, Kernel
from stepquant.layers.quantized import QuantizedModule, quantized_modules
from stepquant.runtime.common import along_channels

OPSET = 17
MOST_BYTES = (1 << 31) - (1 << 20)
"""Maximum bytes of a file, a limit of protobuf."""


class _QuantizeLinear(torch.autograd.Function):
    """``clamp(round(steps) + zero_point, 0, 255)``; steps: float32, zero_point: uint8 []."""

    @staticmethod
    def forward(ctx: Any, steps: Tensor, zero_point: Tensor) -> Tensor:
        return (steps.round() + zero_point).clamp(0, 255).to(torch.uint8)

    @staticmethod
    def symbolic(g: Any, steps: Any, zero_point: Any) -> Any:
        return g.op("QuantizeLinear", steps, g.op("Constant", value_t=torch.tensor(1.0)), zero_point)


class _MatMulInteger(torch.autograd.Function):
    """``(a - a_zero) @ (b - b_zero)`` in int32; both uint8."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, a_zero: Tensor, b_zero: Tensor) -> Tensor:
        return ((a.double() - a_zero) @ (b.double() - b_zero)).to(torch.int32)

    @staticmethod
    def symbolic(g: Any, a: Any, b: Any, a_zero: Any, b_zero: Any) -> Any:
        return g.op("MatMulInteger", a, b, a_zero, b_zero)


def _codes(x: Tensor, inverse: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """uint8 codes of x on a grid given by the reciprocal of its scale, which broadcasts against x."""
    steps = x * inverse
    if bits < 8:  # QuantizeLinear clamps to 0 and 255
        zero = zero_point.float()
        steps = torch.minimum(torch.maximum(steps, -zero), largest_code(bits) - zero)
    return _QuantizeLinear.apply(steps, zero_point)


def _within(grid: Grid, row: Tensor) -> Tensor:
    """The clock's row, or 0 of a static table. Indexed in both cases: onnxruntime does not fuse constant scales."""
    return row.clamp(max=grid.rows - 1)


WEIGHT_ZERO_POINT = 128
"""Zero point of weights, which are uint8 in the file: onnxruntime's uint8 x int8 products saturate at 16 bits on CPUs
with AVX2 but without VNNI; its uint8 x uint8 products are exact everywhere."""


class OnnxKernel(Kernel):
    """A linear or convolution; each run of channels with its own scale is a separate product.

    All samples share the step: row is int64 [].
    """

    def __init__(self, module: QuantizedModule) -> None:
        super().__init__()
        layer = module.layer()
        assert isinstance(layer.input, Grid)
        self.grid, self.bias, self.dim = layer.input, layer.bias, module.channel_dim
        self.geometry: tuple[tuple[int, ...], ...] | None = None
        if isinstance(module, QuantizedConv2d):
            self.geometry = (module.padding, module.stride, module.dilation, module.weight_shape[2:])
        self.weight_zero_point = torch.tensor(WEIGHT_ZERO_POINT, dtype=torch.uint8)
        self.segments: list[tuple[slice, int, Tensor, Tensor]] = []
        """Channels, group of the input, its inverse scale, and the weight's scale."""
        for index, (channels, group, weight) in enumerate(layer.segments()):
            codes = weight.integers().short() + WEIGHT_ZERO_POINT
            self.register_buffer(f"weight_{index}", self._columns(codes.to(torch.uint8)))
            scale = self.grid.scale[:, group]
            if layer.smoothing is not None:
                scale = scale * layer.smoothing[channels]
            self.segments.append((channels, group, scale.reciprocal(), weight.grid.scale[0, 0]))

    def _columns(self, weight: Tensor) -> Tensor:
        """[out, in, *kernel] -> [products of an output, out]; those of a convolution tap by tap."""
        return (weight.permute(2, 3, 1, 0).flatten(0, 2) if weight.dim() == 4 else weight.t()).contiguous()

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        row = _within(self.grid, row)
        scale, zero_point = self.grid.scale[row, :, 0], self.grid.zero_point[row, :, 0]
        y: Tensor | None = None
        for index, (channels, group, inverses, weight_scale) in enumerate(self.segments):
            part = x
            if len(self.segments) > 1:
                part = x.narrow(self.dim, channels.start, channels.stop - channels.start)
            inverse = inverses[row]
            zero = zero_point[group]
            if self.geometry is None:
                codes = _codes(part, inverse, zero, self.grid.bits)
            else:
                codes = self._windows(part, inverse[:, None, None], zero, *self.geometry)
            sums = _MatMulInteger.apply(codes, self.get_buffer(f"weight_{index}"), zero, self.weight_zero_point)
            product = sums.float() * (scale[group] * weight_scale)
            y = product if y is None else y + product
        assert y is not None
        if self.bias is not None:
            y = y + self.bias
        return y if self.geometry is None else y.permute(0, 3, 1, 2)

    def _windows(self, x: Tensor, inverse: Tensor, zero_point: Tensor, *geometry: tuple[int, ...]) -> Tensor:
        """uint8 [B, H', W', products of an output], the codes of each output's window."""
        (ph, pw), (sh, sw), (dh, dw), (kh, kw) = geometry
        x = F.pad(x, (pw, pw, ph, ph))  # zero is on the grid
        codes = _codes(x, inverse, zero_point, self.grid.bits).permute(0, 2, 3, 1)
        height, width = (int(size) for size in codes.shape[1:3])
        down = height - dh * (kh - 1)
        right = width - dw * (kw - 1)
        taps = [
            codes[:, i * dh : i * dh + down : sh, j * dw : j * dw + right : sw] for i in range(kh) for j in range(kw)
        ]
        return torch.cat(taps, dim=3)


class OnnxWeightKernel(Kernel):
    """A layer whose activation stays in floating point; its int8 weight is dequantized in the graph.

    DequantizeLinear is avoided: before a linear, onnxruntime would quantize the activation as well.
    """

    capabilities = Capabilities(integer=False, channel_groups=False, grouped_convolutions=True, most_products=UNLIMITED)
    integers: Tensor

    def __init__(self, module: QuantizedModule) -> None:
        super().__init__()
        layer = module.layer()
        self.apply_map, self.bias, self.dim = linear_map(module), layer.bias, module.channel_dim
        self.scale = layer.weight.grid.scale[0, 0]
        self.register_buffer("integers", layer.weight.integers())

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        weight = self.integers.float() * self.scale.reshape(-1, *(1,) * (self.integers.dim() - 1))
        y = self.apply_map(x, weight, None)
        return y if self.bias is None else y + along_channels(self.bias, self.dim, y.dim())


class OnnxAttention(AttentionKernel):
    """Both products of an attention whose four operands are quantized."""

    def __init__(self, processor: QuantizedAttentionProcessor) -> None:
        super().__init__()
        self.grids = {name: grid for name in OPERANDS if isinstance(grid := processor.grid(name), Grid)}

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, row: Tensor, scale: float | None = None
    ) -> Tensor:
        def coded(name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            grid = self.grids[name]
            at = _within(grid, row)
            scales, zero_points = grid.scale[:, 0, 0], grid.zero_point[:, 0, 0]
            step, inverse, zero_point = scales[at], scales.reciprocal()[at], zero_points[at]
            return _codes(x, inverse, zero_point, grid.bits), step, zero_point

        codes, step, zero_point = coded("key", key)
        scores = _product(coded("query", query), (codes.transpose(-1, -2), step, zero_point))
        scores = scores * (int(query.shape[-1]) ** -0.5 if scale is None else scale)
        if mask is not None:
            scores = scores + mask
        return _product(coded("probability", torch.softmax(scores, dim=-1)), coded("value", value))


def _product(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Product of two tensors, each as codes, scale and zero point: float32."""
    (a_codes, a_scale, a_zero), (b_codes, b_scale, b_zero) = a, b
    return _MatMulInteger.apply(a_codes, b_codes, a_zero, b_zero).float() * (a_scale * b_scale)


@torch.no_grad()
def export_onnx(denoiser: Any, arguments: dict[str, Tensor], path: Path) -> list[str]:
    """Write the quantized `denoiser` as `path` (.onnx); returns the layers that stay in floating point.

    All samples of a batch share the step. The batch is dynamic; other dimensions are those of `arguments`, the
    arguments of one step by flat name (`export.network.example_arguments`).

    Raises:
        StepquantError: if the model is not quantized, the package onnx is not installed, torch cannot write the network
            as ONNX, or the file cannot be written.
    """
    import_optional("onnx", "onnx")
    traceable = Traceable(
        denoiser, list(arguments), lambda layer: OnnxKernel(layer) if OnnxKernel.supports(layer) else None
    )
    for module in traceable.modules():
        if isinstance(module, QuantizedAttentionProcessor) and OnnxAttention.supports(module):
            module.kernel = OnnxAttention(module)
        elif isinstance(module, QuantizedModule) and OnnxWeightKernel.supports(module):
            module.kernel = OnnxWeightKernel(module)
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes that become constants, as intended
            torch.onnx.export(
                traceable,
                traced_values(arguments),
                file,  # type: ignore[arg-type]  # annotated as a path only
                dynamo=False,
                opset_version=OPSET,
                do_constant_folding=False,  # would store the weights of float layers dequantized
                input_names=list(arguments),
                output_names=["output"],
                dynamic_axes={name: {0: "batch"} for name in (*batched(arguments), "output")},
            )
    except Exception as error:  # exceptions of many classes, for operations that ONNX lacks
        raise StepquantError(f"torch cannot write this network as ONNX: {first_line(error)}.") from None
    if file.getbuffer().nbytes > MOST_BYTES:
        raise StepquantError("the network is larger than the 2 GB of an ONNX file: export it to openvino.")
    write_atomic(path, lambda draft: draft.write_bytes(file.getbuffer()))
    return [name for name, layer in quantized_modules(denoiser).items() if not OnnxKernel.supports(layer)]


class OnnxDenoiser(ExportedDenoiser):
    """ONNX network that replaces a diffusers denoiser: ``pipeline.unet = OnnxDenoiser(path, unet)``.

    Args:
        path: the .onnx file that `export_onnx` wrote.
        like: the denoiser that was exported, for its configuration and arguments.

    Raises:
        StepquantError: if onnxruntime is not installed, or cannot read the network.
    """

    def __init__(self, path: Path, like: Any, threads: int | None = None) -> None:
        runtime = import_optional("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        # Exact sums on CPUs without VNNI, whose fastest instructions saturate.
        options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exception classes are created at run time
            raise StepquantError(f"onnxruntime cannot read {path}: {first_line(error)}.") from None
        super().__init__(like, [entry.name for entry in session.get_inputs()])
        self.session = session

    def run(self, arguments: dict[str, Tensor]) -> Tensor:
        given = {name: value.numpy() for name, value in arguments.items()}
        return torch.from_numpy(self.session.run(None, given)[0])
