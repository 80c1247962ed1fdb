"""Shared parts of the exporters: a traceable denoiser, its arguments, and a denoiser that runs an exported network."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from stepquant.core.dynamic import DynamicFormat
from stepquant.errors import StepquantError
from stepquant.layers.attention import QuantizedAttentionProcessor
from stepquant.layers.correction import OutputCorrection
from stepquant.layers.quantized import QuantizedModule, quantized_modules
from stepquant.layers.time_cache import TimeLinear
from stepquant.models import denoiser_name
from stepquant.pipelines.arguments import flatten, nest
from stepquant.pipelines.recording import record_calls
from stepquant.pipelines.request import make_request
from stepquant.runtime import KernelFactory, prepare

TIMESTEP = "timestep"
IMAGES = 2
"""Images of the example that networks are traced with."""


def example_arguments(pipeline: Any) -> dict[str, Tensor]:
    """Arguments of the denoiser at the first step of two images, by flat name.

    With guidance, the batch has one image of each half.

    Raises:
        StepquantError: if the pipeline cannot generate from noise alone.
    """
    request = make_request(pipeline, 1)
    found = record_calls(pipeline, denoiser_name(pipeline), request, range(IMAGES), seed=0)[0].arguments
    sample = next(value for value in found.values() if isinstance(value, Tensor))
    found[TIMESTEP] = torch.as_tensor(found[TIMESTEP]).reshape(-1).expand(len(sample))
    flat = {name: value for key, value in found.items() for name, value in flatten(key, value)}
    tensors = {name: to_float32(value.cpu()) for name, value in flat.items() if isinstance(value, Tensor)}
    halves = len(sample) // IMAGES
    rows = [image % halves * IMAGES + image for image in range(IMAGES)]
    return {
        name: value[rows] if value.dim() > 0 and len(value) == len(sample) else value for name, value in tensors.items()
    }


def import_optional(name: str, extra: str) -> Any:
    """Import a package of an extra of stepquant; raises `StepquantError` if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise StepquantError(f"{name} is not installed: pip install 'stepquant[{extra}]'.") from None


def to_float32(tensor: Tensor) -> Tensor:
    """Convert a floating-point tensor to float32; leave others unchanged."""
    return tensor.float() if tensor.is_floating_point() else tensor


class _Time:
    """Replaces `StepClock` while tracing: time and row are part of the traced graph."""

    time: Tensor
    row: Tensor


class Traceable(nn.Module):
    """Copy of a quantized denoiser that can be traced: a function of positional tensors.

    All samples of a batch share the timestep, of shape [1], and the graph looks up its row of the tables.

    Args:
        names: flat names of the arguments, in the order of `forward`'s values.
        kernel_of: returns the kernel of a layer in operations that can be exported, or None for floating point.

    Raises:
        StepquantError: if the denoiser is not quantized, its activations are dynamic, or their bits depend on the step.
    """

    boundaries: Tensor

    def __init__(self, denoiser: Any, names: list[str], kernel_of: KernelFactory) -> None:
        super().__init__()
        if not quantized_modules(denoiser):
            raise StepquantError("the denoiser is not quantized: expected one that `stepquant quantize` wrote.")
        inputs = [layer.format.input for layer in quantized_modules(denoiser).values()]
        if any(grid is not None and grid.by_row for grid in inputs):
            raise StepquantError(
                "an exported network has the same activation bits in all steps, and this model has other bits in some. "
                "Quantize it without step_bits."
            )
        if any(isinstance(grid, DynamicFormat) for grid in inputs):
            raise StepquantError(
                "an exported network needs activation scales that are stored, and this model computes them from the "
                "activations. Quantize it with activations='static'."
            )
        self.names, self.clock = names, _Time()
        model = copy.deepcopy(denoiser)
        prepare(model, kernel_of)
        grid = next(iter(quantized_modules(model).values())).clock.timesteps
        self.register_buffer("boundaries", (grid[1:] + grid[:-1]) / 2)
        model._forward_pre_hooks.clear()
        # OpenVINO would try to unpack a model with a quantization_config itself.
        model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "quantization_config"})
        for module in model.modules():
            if isinstance(module, (QuantizedModule, QuantizedAttentionProcessor, OutputCorrection)):
                module.clock = self.clock  # type: ignore[assignment]
            if isinstance(module, (QuantizedModule, TimeLinear)):
                module.time_cache = None  # a cached output would be a constant of the graph
        self.model = model

    def forward(self, *values: Tensor) -> Tensor:
        arguments = dict(zip(self.names, values, strict=True))
        time = arguments[TIMESTEP]
        self.clock.time, self.clock.row = time[0], (time > self.boundaries).sum()
        arguments[TIMESTEP] = time.expand(values[0].shape[0])
        result: Tensor = self.model(**nest(arguments), return_dict=False)[0]
        return result


def traced_values(arguments: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Values for `Traceable.forward`: the timestep is float32 [1]."""
    return tuple(
        value.float().reshape(-1)[:1] if name == TIMESTEP else value.contiguous() for name, value in arguments.items()
    )


def batched(arguments: dict[str, Tensor]) -> list[str]:
    """Names of the arguments whose first dimension is the batch, which is exported as dynamic."""
    batch = next(iter(arguments.values())).shape[0]
    return [
        name for name, value in arguments.items() if name != TIMESTEP and value.dim() > 0 and value.shape[0] == batch
    ]


class ExportedDenoiser(nn.Module):
    """Base class of exported networks that replace a diffusers denoiser.

    Args:
        like: the denoiser that was exported, for its configuration and arguments.
        names: flat names of the network's inputs.
    """

    def __init__(self, like: Any, names: list[str]) -> None:
        super().__init__()
        self.config, self.dtype, self.device = like.config, torch.float32, torch.device("cpu")
        self.names, self.signature = names, inspect.signature(like.forward)
        self.forward = functools.partial(self._forward)
        self.forward.__signature__ = self.signature  # type: ignore[attr-defined]  # what pipelines read

    def run(self, arguments: dict[str, Tensor]) -> Tensor:
        """Run the network on contiguous arguments, one for each of `names`."""
        raise NotImplementedError

    def _forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        given = self.signature.bind_partial(*args, **kwargs).arguments
        given[TIMESTEP] = time = torch.as_tensor(given[TIMESTEP]).float().reshape(-1)
        if bool((time != time[0]).any()):
            raise StepquantError("the samples of a batch have several timesteps: an exported network takes one.")
        flat = {name: value for key, entry in given.items() for name, value in flatten(key, entry)}
        tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
        if set(tensors) != set(self.names):
            odd = sorted(set(tensors) ^ set(self.names))[0]
            state = "does not take" if odd in tensors else "needs"
            raise StepquantError(f"the network {state} {odd!r}: export it from a pipeline that is used the same way.")
        inputs = {name: to_float32(value).contiguous() for name, value in tensors.items()}
        result = self.run(inputs | {TIMESTEP: time[:1]})
        return UNet2DOutput(sample=result) if return_dict else (result,)
