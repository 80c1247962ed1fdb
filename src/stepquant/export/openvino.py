"""OpenVINO export: an integer network with per-step scales, and a denoiser that runs it.

OpenVINO quantizes with constant scales, so per-step scales are folded around them. With the grid (s, z) of a reference
row and (s_t, z_t) of step t,

    u = pad(x) * (s / s_t) + (z_t - z) * s       has the codes on (s, z) that pad(x) has on (s_t, z_t),
    y = conv(Q(u), w) * (s_t / s) - (z_t - z) * s_t * sum(w) + bias.

The image is padded before it is shifted, so that sum(w) is the same for every window and the border is exactly zero.
Weights are stored as int8.
"""

from __future__ import annotations

import tempfile
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
from stepquant.files import cannot_write
from stepquant.layers.conv import QuantizedConv2d
from stepquant.layers.kernel import UNLIMITED, Capabilities, Kernel
from stepquant.layers.quantized import QuantizedModule, quantized_modules


class FoldedKernel(Kernel):
    """A layer in operations that OpenVINO runs in int8; equal to the reference up to rounding."""

    capabilities = Capabilities(channel_groups=False, grouped_convolutions=True, most_products=UNLIMITED)
    integers: Tensor
    weight_scale: Tensor
    total: Tensor

    def __init__(self, module: QuantizedModule) -> None:
        super().__init__()
        layer = module.layer()
        grid, weight = layer.input, layer.weight
        assert isinstance(grid, Grid)
        self.is_convolution = isinstance(module, QuantizedConv2d)
        self.geometry: tuple[Any, ...] = ()
        self.padding: tuple[int, int] = (0, 0)
        if isinstance(module, QuantizedConv2d):
            self.geometry = (module.stride, (0, 0), module.dilation, module.groups)
            self.padding = module.padding
        self.reference = grid.rows // 2
        self.scale = grid.scale[:, 0, 0]
        self.zero_point = grid.zero_point[:, 0, 0].float()
        self.top = largest_code(grid.bits)
        self.register_buffer("integers", weight.integers(), persistent=False)
        spread = (-1, *(1,) * (weight.codes.dim() - 1))
        self.register_buffer("weight_scale", weight.grid.scale[0, 0].reshape(spread).clone(), persistent=False)
        self.register_buffer("total", weight.dequantize().flatten(1).sum(1), persistent=False)
        self.bias = layer.bias
        self.smoothing = layer.smoothing

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        scale, zero_point = float(self.scale[self.reference]), int(self.zero_point[self.reference])
        if self.smoothing is not None:
            x = x / (self.smoothing[:, None, None] if self.is_convolution else self.smoothing)
        if self.is_convolution and any(self.padding):
            height, width = self.padding
            x = F.pad(x, (width, width, height, height))
        static = self.scale.shape[0] == 1
        step, shift = torch.ones(()), torch.zeros(())
        if not static:
            step, shift = self.scale[row] / scale, self.zero_point[row] - zero_point
            x = x / step + shift * scale
        x = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, self.top)
        weight = self.integers.float() * self.weight_scale
        y = F.conv2d(x, weight, None, *self.geometry) if self.is_convolution else F.linear(x, weight)
        if not static:
            lost = shift * scale * self.total
            y = (y - (lost[:, None, None] if self.is_convolution else lost)) * step
        if self.bias is None:
            return y
        return y + (self.bias[:, None, None] if self.is_convolution else self.bias)


@torch.no_grad()
def export_openvino(denoiser: Any, arguments: dict[str, Tensor], path: Path) -> list[str]:
    """Write the quantized `denoiser` as `path` (.xml) and .bin; returns the layers that stay in floating point.

    All samples of a batch share the step. The batch is dynamic; other dimensions are those of `arguments`, the
    arguments of one step by flat name (`export.network.example_arguments`).

    Raises:
        StepquantError: if the model is not quantized, OpenVINO is not installed or refuses the network, or the file
            cannot be written.
    """
    openvino = import_optional("openvino", "bench")
    traceable = Traceable(
        denoiser, list(arguments), lambda layer: FoldedKernel(layer) if FoldedKernel.supports(layer) else None
    )
    values, free = traced_values(arguments), batched(arguments)
    shapes = [
        [-1, *value.shape[1:]] if name in free else list(value.shape)
        for name, value in zip(arguments, values, strict=True)
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes that become constants, as intended
            network = openvino.convert_model(traceable, example_input=values, input=shapes)
    except Exception as error:  # exceptions of many classes, for operations that OpenVINO lacks
        raise StepquantError(f"OpenVINO cannot take this network: {first_line(error)}.") from None
    for node, name in zip(network.inputs, arguments, strict=True):
        node.get_tensor().set_names({name})
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as draft:
            openvino.save_model(network, Path(draft) / path.name, compress_to_fp16=False)
            for name in (path.with_suffix(".bin").name, path.name):  # the network last, since it needs its weights
                (Path(draft) / name).replace(path.parent / name)
    except (OSError, RuntimeError) as error:
        raise cannot_write(path, error) from None
    return [name for name, layer in quantized_modules(denoiser).items() if not FoldedKernel.supports(layer)]


class OpenVinoDenoiser(ExportedDenoiser):
    """OpenVINO network that replaces a diffusers denoiser: ``pipeline.unet = OpenVinoDenoiser(path, unet)``.

    Args:
        path: the .xml file that `export_openvino` wrote.
        like: the denoiser that was exported, for its configuration and arguments.
        precision: dtype of floating-point operations, "f32" or "bf16".

    Raises:
        StepquantError: if OpenVINO is not installed, or cannot read the network.
    """

    def __init__(self, path: Path, like: Any, precision: str = "f32", threads: int | None = None) -> None:
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        openvino = import_optional("openvino", "bench")
        try:
            network = openvino.Core().compile_model(path, "CPU", options)
        except RuntimeError as error:
            raise StepquantError(f"OpenVINO cannot read {path}: {first_line(error)}.") from None
        super().__init__(like, [node.get_any_name() for node in network.inputs])
        self.request = network.create_infer_request()

    def run(self, arguments: dict[str, Tensor]) -> Tensor:
        results = self.request.infer({name: value.numpy() for name, value in arguments.items()})
        return torch.from_numpy(next(iter(results.values())).copy())
