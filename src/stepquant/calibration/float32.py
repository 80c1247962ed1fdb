"""Weights that stay in half precision in a model that computes in float32.

A model loaded in bfloat16 or float16 is calibrated as it is: its weights, nearly all of its memory, are widened layer
by layer as they are used and never kept, while activations, norms, biases and everything found or learned are float32.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.layers.quantized import can_quantize


class WideLinear(nn.Linear):
    """A linear that multiplies in float32 whatever its weight is held in."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.float(), self.bias)


class WideConv2d(nn.Conv2d):
    """A convolution that multiplies in float32 whatever its weight is held in."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight.float(), self.bias)


def computing_in_float32(model: nn.Module) -> nn.Module:
    """`model` itself if it is in float32; else a copy that computes in float32 on the same weights, not copied."""
    parameters = list(model.parameters())
    if all(parameter.dtype == torch.float32 for parameter in parameters):
        return model
    # The first parameter is widened like all small ones: diffusers takes its type for the model's.
    weights: list[Any] = [module.weight for module in model.modules() if can_quantize(module)]
    shared: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=False)
        for weight in weights
        if weight is not parameters[0]
    }
    held = {id(weight) for weight in shared.values()}
    wide = copy.deepcopy(model, shared).requires_grad_(False).eval()  # which enters all that it copies into `shared`
    for tensor in [*wide.parameters(), *wide.buffers()]:
        if id(tensor) not in held and tensor.is_floating_point():
            tensor.data = tensor.data.float()
    for module in wide.modules():
        if can_quantize(module):
            module.__class__ = WideLinear if isinstance(module, nn.Linear) else WideConv2d
    return wide
