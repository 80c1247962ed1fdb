"""Compute in float32 with weights stored in half precision.

A model in bfloat16 or float16 keeps its weights, nearly all of its memory, in that dtype during calibration: each layer
converts its weight when it is used. Activations, norms, biases, grids and learned values are float32.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.layers.conv import linear_map, weight_by_output
from stepquant.layers.quantized import QUANTIZED, can_quantize


class _Wide(nn.Module):
    """A linear or convolution that computes in float32 with a weight of any dtype."""

    def forward(self, input: Tensor) -> Tensor:
        layer: Any = self
        return linear_map(layer)(input, weight_by_output(layer).float(), layer.bias)


WIDE = {kind: type(f"Wide{kind.__name__}", (_Wide, kind), {"__module__": __name__}) for kind in QUANTIZED}
"""Class of a layer -> its subclass that computes in float32."""


def computing_in_float32(model: nn.Module) -> nn.Module:
    """Return `model` if it is in float32, else a copy that computes in float32 and shares the weights of `model`."""
    parameters = list(model.parameters())
    if all(parameter.dtype == torch.float32 for parameter in parameters):
        return model
    # The first parameter is converted like all small ones: diffusers takes its dtype for that of the model.
    weights: list[Any] = [module.weight for module in model.modules() if can_quantize(module)]
    shared: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False)
        for weight in weights
        if weight is not parameters[0]
    }
    stored = {id(weight) for weight in shared.values()}
    wide = copy.deepcopy(model, shared).requires_grad_(False).eval()  # deepcopy adds every copy to `shared`
    for tensor in [*wide.parameters(), *wide.buffers()]:
        if id(tensor) not in stored and tensor.is_floating_point():
            tensor.data = tensor.data.float()
    for module in wide.modules():
        if can_quantize(module):
            module.__class__ = next(wide for kind, wide in WIDE.items() if isinstance(module, kind))
    return wide
