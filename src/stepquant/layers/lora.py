"""LoRA on a quantized model: a full-precision branch beside each quantized layer.

    y = quantized(x) + scaling * B(A(x))

The quantized weight does not change, so the usual methods of diffusers load, weight, switch and remove adapters. To
merge an adapter into the weights, fuse it into the full-precision model before quantizing. Needs peft, as in diffusers.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from typing import Any

from torch import nn

from stepquant.errors import StepquantError, first_line
from stepquant.layers.conv import CONVOLVE, QuantizedConv
from stepquant.layers.linear import QuantizedLinear
from stepquant.layers.quantized import QuantizedModule, quantized_modules, replace_module


def enable_lora(model: Any) -> None:
    """Make ``model.load_lora_adapter``, which ``pipeline.load_lora_weights`` calls, work on quantized layers.

    peft adapts only layers of known classes or with an adapter, so each quantized layer gets an empty adapter while one
    is loaded. Models without LoRA support do not change.
    """
    if hasattr(type(model), "load_lora_adapter"):
        model.load_lora_adapter = functools.partial(_load_lora_adapter, model)


def _load_lora_adapter(model: Any, weights: Any, *args: Any, **kwargs: Any) -> None:
    """`load_lora_adapter` of the model's class, on a quantized model.

    Raises:
        StepquantError: if peft is not installed, or the adapter is for other layers or shapes than the model has.
    """
    if find_spec("peft") is None:
        raise StepquantError("a LoRA needs peft: pip install 'stepquant[lora]'.")
    layers = {name: layer for name, layer in quantized_modules(model).items() if not name.endswith("base_layer")}
    # peft has no adapter for transposed convolutions.
    layers = {name: layer for name, layer in layers.items() if not getattr(layer, "transposed", False)}
    adapted = {name: _with_empty_adapter(layer) for name, layer in layers.items()}
    for name, layer in adapted.items():
        replace_module(model, name, layer)
    before = _count(model)
    try:
        type(model).load_lora_adapter(model, weights, *args, **kwargs)
    except (RuntimeError, ValueError, KeyError) as error:
        raise StepquantError(
            f"the LoRA does not fit this {type(model).__name__}: {_reason(error)}; give one made for this model."
        ) from None
    finally:
        for name, layer in adapted.items():
            if not layer.lora_A:
                replace_module(model, name, layer.base_layer)
    if weights and _count(model) == before:
        raise StepquantError(
            f"the LoRA does not fit this {type(model).__name__}: none of its layers is one of the model's; give one "
            "made for this model."
        )
    _move(model)


def _reason(error: Exception) -> str:
    """The line about a wrong shape, which torch puts after a title, else the first line."""
    lines = str(error).splitlines()
    return next((line.strip().rstrip(".") for line in lines if "size mismatch" in line), first_line(error))


def _with_empty_adapter(module: QuantizedModule) -> Any:
    return _classes()[len(module.weight_shape) - 2](module)


def _count(model: nn.Module) -> int:
    from peft.tuners.lora import LoraLayer

    return sum(len(module.lora_A) for module in model.modules() if isinstance(module, LoraLayer))


def _move(model: nn.Module) -> None:
    """Move adapters to the device of their layers, since peft finds no weight to determine it from."""
    classes = tuple(_classes().values())
    for module in model.modules():
        if isinstance(module, classes):
            device = module.base_layer.device
            module.lora_A.to(device)
            module.lora_B.to(device)


@functools.cache
def _classes() -> dict[int, Any]:
    """Kernel dimensions -> LoRA layer around a quantized layer; created on first use, since peft is optional."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d, Linear

    class Unmerged:
        """Refuses merging, and provides the shapes of quantized layers."""

        def merge(self, *_args: Any, **_kwargs: Any) -> None:
            raise StepquantError(
                "a LoRA cannot be fused into weights that are quantized already: fuse it into the full-precision "
                "pipeline, then quantize that; or leave it unfused, as a separate branch."
            )

        def _get_in_out_features(self, module: Any) -> Any:
            if isinstance(module, QuantizedLinear):
                return module.in_features, module.out_features
            assert isinstance(module, QuantizedConv)
            return module.in_channels, module.out_channels

    class QuantizedLoraLinear(Unmerged, Linear):
        def __init__(self, base_layer: QuantizedLinear) -> None:
            nn.Module.__init__(self)
            LoraLayer.__init__(self, base_layer)
            self.fan_in_fan_out = self.is_target_conv_1d_layer = False

    def convolution(dims: int, layer: type[nn.Module], base: Any) -> Any:
        class QuantizedLoraConv(Unmerged, base):
            base_layer: Any

            def __init__(self, base_layer: QuantizedConv) -> None:
                nn.Module.__init__(self)
                LoraLayer.__init__(self, base_layer)
                self._kernel_dim, self.conv_fn = dims + 2, CONVOLVE[dims, False]

            def update_layer(self, *args: Any, **kwargs: Any) -> None:
                # peft creates the branch from the class and geometry of the base layer.
                quantized = self.base_layer
                self.base_layer = layer(1, 1, quantized.kernel_size, quantized.stride, quantized.padding)
                try:
                    super().update_layer(*args, **kwargs)
                finally:
                    self.base_layer = quantized

        return QuantizedLoraConv

    layers = ((1, nn.Conv1d, Conv1d), (2, nn.Conv2d, Conv2d), (3, nn.Conv3d, Conv3d))
    return {0: QuantizedLoraLinear} | {dims: convolution(dims, layer, base) for dims, layer, base in layers}
