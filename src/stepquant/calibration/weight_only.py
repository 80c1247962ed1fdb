"""Weights alone, without samples: what can be quantized while a model is being loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stepquant.calibration.fake_quant.layers import wrap
from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.layers.clock import StepClock
from stepquant.layers.lora import enable_lora
from stepquant.layers.quantized import can_quantize, quantized_like, replace_module


@torch.no_grad()
def quantize_weights(model: nn.Module, spec: QuantSpec) -> dict[str, Any]:
    """Replace every linear and convolution of `model`, in place and one by one, by one with rounded weights.

    Ranges are each output channel's smallest and largest value, codes the nearest. Any model of diffusers will do: no
    family has to describe it. So no layer counts as first or last, and what is to keep more bits is an override.
    Layers that the model's own class keeps in float32 (``_keep_in_fp32_modules``: T5's ``wo``, Wan's ``time_embedder``)
    stay as they are: its code reads the type of their parameters.

    Returns:
        The structure of the quantization, as a configuration holds it.

    Raises:
        StepquantError: if there is nothing to quantize, or an override of the spec quantizes an activation.
    """
    layers, clock = {}, StepClock()
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, module in list(model.named_modules()):
        bits = spec.layer_bits(name)
        if not can_quantize(module) or bits.is_float or kept & set(name.split(".")):
            continue
        if bits.activation < 16:
            raise StepquantError(f"override {bits} of layer {name} needs samples: give bits such as w8a16.")
        device = module.weight.device
        wrapped = wrap(module.float(), bits.weight, None, clock, group_size=spec.group_size, weight_range="minmax")
        replacement = quantized_like(module, wrapped.freeze(), clock)
        replace_module(model, name, replacement.to(device))
        layers[name] = replacement.format.model_dump(mode="json")
    if not layers:
        raise StepquantError(
            f"{type(model).__name__} cannot be quantized: it has no linear and no convolution to quantize to {spec}."
        )
    enable_lora(model)
    return {"timesteps": clock.timesteps.tolist(), "layers": layers, "attentions": {}}
