"""OpenVINO: an integer network with the step's scales inside, and a denoiser that runs it.

OpenVINO quantizes with constants, so a layer's table is folded around one of them. With the grid (s, z) of a reference
row, and (s_t, z_t) of the step's,

    u = pad(x) * (s / s_t) + (z_t - z) * s       has the codes on (s, z) that pad(x) has on (s_t, z_t),
    y = conv(Q(u), w) * (s_t / s) - (z_t - z) * s_t * sum(w) + bias.

The picture is padded before it is shifted, so that the sum of weights is the same for every window and the border stays
exactly zero. Weights are stored as int8.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from stepquant.errors import StepquantError
from stepquant.nn.attention import QuantizedAttentionProcessor
from stepquant.nn.clock import StepClock
from stepquant.nn.deploy import quantized_modules
from stepquant.nn.layers import Kernel, QuantizedConv2d, QuantizedModule
from stepquant.numerics.affine import largest_code
from stepquant.runtime import prepare


class FoldedKernel(Kernel):
    """A layer in operations that OpenVINO runs in int8; for tracing, and equal to the reference but for rounding."""

    integers: Tensor
    weight_scale: Tensor
    total: Tensor

    def __init__(self, module: QuantizedModule) -> None:
        super().__init__()
        layer = module.layer()
        assert layer.activation is not None
        weight = layer.weight
        self.is_convolution = isinstance(module, QuantizedConv2d)
        self.geometry: tuple[Any, ...] = ()
        self.padding: tuple[int, int] = (0, 0)
        if isinstance(module, QuantizedConv2d):
            self.geometry = (module.stride, (0, 0), module.dilation, module.groups)
            self.padding = module.padding
        self.reference = layer.activation.scale.shape[0] // 2
        self.scale = layer.activation.scale[:, 0]
        self.zero_point = layer.activation.zero_point[:, 0].float()
        self.top = largest_code(layer.activation.bits)
        self.register_buffer("integers", weight.integers(), persistent=False)
        spread = (-1, *(1,) * (weight.codes.dim() - 1))
        self.register_buffer("weight_scale", weight.scale[0].reshape(spread).clone(), persistent=False)
        self.register_buffer("total", weight.dequantize().flatten(1).sum(1), persistent=False)
        self.bias = layer.bias
        self.balance = layer.balance

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        scale, zero_point = float(self.scale[self.reference]), int(self.zero_point[self.reference])
        if self.balance is not None:
            x = x / (self.balance[:, None, None] if self.is_convolution else self.balance)
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


def can_fold(module: QuantizedModule) -> bool:
    """Whether a layer has one grid for its weight and one for its input; others are exported in floating point."""
    layer_format = module.layer_format
    groups = len(layer_format.weight_groups), len(layer_format.activation_groups)
    return layer_format.activation_bits is not None and groups[0] == 1 and groups[1] <= 1


class _Row:
    """Stands for a `StepClock` while tracing: its row is part of the traced graph."""

    row: Tensor


class _Traced(nn.Module):
    """A denoiser of positional arguments that finds its table row in the graph."""

    boundaries: Tensor

    def __init__(self, model: nn.Module, names: list[str], clock: StepClock) -> None:
        super().__init__()
        self.model, self.names, self.clock = model, names, _Row()
        grid = clock.timesteps
        self.register_buffer("boundaries", (grid[1:] + grid[:-1]) / 2)
        for module in model.modules():
            if isinstance(module, (QuantizedModule, QuantizedAttentionProcessor)):
                module.clock = self.clock  # type: ignore[assignment]
            if isinstance(module, QuantizedModule):
                module.memo = None

    def forward(self, *values: Tensor) -> Tensor:
        arguments = dict(zip(self.names, values, strict=True))
        self.clock.row = (arguments["timestep"].reshape(-1)[:1] > self.boundaries).sum()
        result: Tensor = self.model(**arguments, return_dict=False)[0]
        return result


@torch.no_grad()
def export_openvino(denoiser: Any, arguments: dict[str, Tensor], path: Path) -> list[str]:
    """Write `denoiser`, quantized, as `path` (.xml) and its weights beside it; returns the layers left in float.

    All samples of a batch share the step, as in every sampler. The batch is free, other dimensions are those of
    `arguments`, one step's arguments by name.

    Raises:
        StepquantError: if the model is not quantized, or OpenVINO is not installed.
    """
    openvino = _openvino()
    if not quantized_modules(denoiser):
        raise StepquantError("the denoiser is not quantized: give a folder that `stepquant quantize` wrote.")
    model = copy.deepcopy(denoiser)
    prepare(model, "reference")
    layers = quantized_modules(model)
    for layer in layers.values():
        if can_fold(layer):
            layer.kernel = FoldedKernel(layer)
    clock = next(iter(layers.values())).clock
    model._forward_pre_hooks.clear()
    # OpenVINO takes a quantization in the configuration for one of those it unpacks itself.
    model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "quantization_config"})
    values = tuple(value if value.dim() else value[None] for value in arguments.values())
    traced = _Traced(model, list(arguments), clock)
    shapes = [[-1, *value.shape[1:]] if value.dim() > 1 else list(value.shape) for value in values]
    network = openvino.convert_model(traced, example_input=values, input=shapes)
    openvino.save_model(network, path, compress_to_fp16=False)
    return [name for name, layer in layers.items() if not can_fold(layer)]


class OpenVinoDenoiser(nn.Module):
    """The network of `path` in the place of a diffusers denoiser: ``pipeline.unet = OpenVinoDenoiser(path, unet)``.

    Args:
        path: the .xml that `export_openvino` wrote.
        like: the denoiser it was made from, whose configuration and output class it keeps.
        precision: of what is not in integers, "f32" or "bf16".
    """

    def __init__(self, path: Path, like: Any, precision: str = "f32", threads: int | None = None) -> None:
        super().__init__()
        self.config, self.dtype, self.device = like.config, torch.float32, torch.device("cpu")
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        self.request = _openvino().Core().compile_model(path, "CPU", options).create_infer_request()

    def forward(self, sample: Tensor, timestep: Any, *more: Tensor, return_dict: bool = True, **_kwargs: Any) -> Any:
        time = torch.as_tensor(timestep).float().reshape(-1)[:1]
        given = [sample.numpy(), time.numpy(), *(value.numpy() for value in more)]
        given += [_kwargs["encoder_hidden_states"].numpy()] if "encoder_hidden_states" in _kwargs else []
        result = torch.from_numpy(next(iter(self.request.infer(given).values())).copy())
        if not return_dict:
            return (result,)
        from diffusers.models.unets.unet_2d import UNet2DOutput

        return UNet2DOutput(sample=result)


def _openvino() -> Any:
    try:
        import openvino
    except ImportError:
        raise StepquantError("OpenVINO is not installed: pip install 'stepquant[bench]'.") from None
    return openvino
