"""GPTQ of a block's weights, which also corrects what quantization did to their inputs, in closed form."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.layers import CalibratedLayer
from stepquant.core.affine import largest_code
from stepquant.core.gptq import aligned_weight, gptq_weight, input_rows, row_step, split_inputs
from stepquant.optimize.block import Block
from stepquant.optimize.replay import Reached

SUMS = 16
"""Parts that the samples are divided into: each is added up by one process, and the parts in order by all, so that the
sum is the same however many processes there are. More parts would mean more to send, two matrices of [in, in] each."""


@torch.no_grad()
def gptq(block: Block, layers: dict[str, CalibratedLayer]) -> None:
    """Decide the codes of a block's weights so that its layers match full precision on full-precision inputs.

    Layer after layer, in the order given: the least-squares weight from the layer's quantized input to its
    full-precision output, then GPTQ's greedy rounding of that; some inputs at a time where they are many. Depthwise and
    grouped convolutions are left as they are.

    Args:
        layers: those of the block to round, by name and in execution order.
    """
    dense = {name: layer for name, layer in layers.items() if _is_dense(layer.inner)}
    for layer in dense.values():
        layer.weight_point.bypassed = True
    batches = block.batches()
    each = math.ceil(len(batches) / SUMS)
    parts = [batches[start : start + each] for start in range(0, len(batches), each)]
    for name, layer in dense.items():
        moments, cross = _zeros(layer), _zeros(layer)
        for added in block.ranks.map(partial(_products, block, name), parts):
            for total, part in zip(moments + cross, added, strict=True):
                total += part
        codes = _gptq_layer(layer, moments, cross) if block.ranks.is_main else None
        layer.weight_point.set_codes(block.ranks.broadcast(codes))
        layer.weight_point.bypassed = False


def _products(block: Block, name: str, batches: list[slice]) -> list[Tensor]:
    """``X' X'^T`` and ``X X'^T`` of a layer's inputs over some batches, quantized X' and full-precision X.

    First all of the one kind, then all of the other, each for every part of the inputs (`split_inputs`).
    """
    original, layer = block.full_precision.get_submodule(name), block.calibrated.layers[name]
    moments, cross = _zeros(layer), _zeros(layer)
    for chosen in batches:
        wanted = _input_of(original, block.original, block.clean.at(chosen))
        block.calibrated.clock.set(block.samples.timesteps[chosen])
        given = _input_of(layer, block.module, block.inputs.at(chosen))
        if wanted is None or given is None:  # an expert that no token of the batch is routed to
            continue
        if layer.input_point is not None:
            given = layer.input_point(given)
        step = row_step(len(block.samples), given, layer.inner)
        rows = input_rows(given, layer.inner, step)
        # Quantization may route other tokens to an expert: then there is nothing to align with.
        wanted_rows = input_rows(wanted, layer.inner, step) if wanted.shape == given.shape else rows
        for index, part in enumerate(_parts(layer)):
            moments[index] += rows[:, part].t() @ rows[:, part]
            cross[index] += wanted_rows[:, part].t() @ rows[:, part]
    return moments + cross


def _parts(layer: CalibratedLayer) -> list[slice]:
    weight = layer.weight
    return split_inputs(weight.shape[1], weight[0, 0].numel())


def _zeros(layer: CalibratedLayer) -> list[Tensor]:
    sizes = [part.stop - part.start for part in _parts(layer)]
    return [torch.zeros(size, size, device=layer.weight.device) for size in sizes]


def _gptq_layer(layer: CalibratedLayer, moments: list[Tensor], cross: list[Tensor]) -> Tensor:
    weight, bits = layer.weight, layer.weight_point.bits
    flat = weight.flatten(1)
    scale, zero_point = (
        values.expand_as(weight).flatten(1) for values in layer.weight_point.quantizer.grid.expanded(weight)
    )
    decided = torch.empty(flat.shape, dtype=torch.uint8, device=flat.device)
    for part, moment, crossed in zip(_parts(layer), moments, cross, strict=True):
        grid = (scale[:, part], zero_point[:, part])
        aligned = aligned_weight(flat[:, part], moment, crossed)
        rounded = gptq_weight(aligned, moment, *grid, bits)
        codes = (torch.round(rounded / grid[0]) + grid[1]).clamp(0, largest_code(bits))
        decided[:, part] = codes.to(torch.uint8)
    return decided.view_as(weight)


def _is_dense(module: nn.Module) -> bool:
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1
    return isinstance(module, nn.Linear) or convolution


def _input_of(layer: nn.Module, block: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor | None:
    """What `layer` is given in a run of its block, which goes no further than there; None if it is not called."""

    def stop(_layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        raise Reached(inputs, named)

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    args, kwargs = arguments
    try:
        block(*args, **kwargs)
    except Reached as reached:
        given: Tensor = next(iter((*reached.given, *reached.named.values())))
        return given
    finally:
        handle.remove()
    return None
