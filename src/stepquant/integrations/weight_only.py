"""Weight-only quantization, without samples."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from stepquant.config import FLOAT_BITS, QuantSpec
from stepquant.core.qtensor import QuantizedLayer
from stepquant.core.weights import group_channels, round_to_nearest
from stepquant.errors import StepquantError
from stepquant.layers.clock import StepClock
from stepquant.layers.conv import weight_by_output
from stepquant.layers.methods import adapt_methods
from stepquant.layers.quantized import can_quantize, kept_in_float32, quantized_like, replace_module


@torch.no_grad()
def quantize_weights(model: nn.Module, spec: QuantSpec) -> dict[str, Any]:
    """Replace linears and convolutions of `model`, in place, with layers whose weights are rounded to nearest.

    Ranges are min-max per output channel. Works for any model of diffusers or transformers, without a description of
    its family; so no layer counts as first or last, and layers that need more bits are overrides. Layers that the
    model's class keeps in float32 are not replaced.

    Returns:
        The structure of the quantized model, for its configuration.

    Raises:
        StepquantError: if there is nothing to quantize, or an override of the spec quantizes an activation.
    """
    layers, clock = {}, StepClock()
    float32_layers = kept_in_float32(model)
    for name, module in list(model.named_modules()):
        bits = spec.layer_bits(name)
        if not can_quantize(module) or bits.is_float or name in float32_layers:
            continue
        if bits.activation < FLOAT_BITS:
            raise StepquantError(f"override {bits} of layer {name} needs samples; expected bits such as w8a16.")
        weight, bias = weight_by_output(module), cast(Any, module.bias)
        group_size = None if getattr(module, "groups", 1) > 1 else spec.group_size
        rounded = round_to_nearest(weight, bits.weight, group_channels(weight.shape[1], None, group_size))
        layer = QuantizedLayer(rounded, None if bias is None else bias.detach().float().cpu(), None)
        replacement = quantized_like(module, layer, clock)
        replace_module(model, name, replacement.to(weight.device))
        layers[name] = replacement.format.model_dump(mode="json")
    if not layers:
        raise StepquantError(
            f"{type(model).__name__} cannot be quantized to {spec}: it has no linear and no convolution to quantize."
        )
    adapt_methods(model)
    return {"timesteps": clock.timesteps.tolist(), "layers": layers, "attentions": {}}
