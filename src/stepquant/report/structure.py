"""Structure of a quantized denoiser: its layers with bits and sizes, and the range of every activation."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from stepquant.checkpoint.write import narrow_tensors
from stepquant.core.affine import largest_code
from stepquant.core.dynamic import DynamicGrid
from stepquant.core.qtensor import Grid
from stepquant.layers.attention import QuantizedAttentionProcessor
from stepquant.layers.conv import QuantizedConv
from stepquant.layers.install import made_by_quantization
from stepquant.layers.interception import quantized_attentions
from stepquant.layers.quantized import QuantizedModule, can_quantize, quantized_modules


@dataclass(frozen=True)
class ActivationRange:
    """Range of one quantized activation in each table row.

    Attributes:
        name: the layer whose input it is, or the attention and its operand; with the channels if there are several
            groups.
        bits: 2 to 8.
        scale: float32 [R], R = 1 if it is static; rows in ascending order of their timesteps.
    """

    name: str
    bits: int
    scale: Tensor

    @property
    def width(self) -> Tensor:
        """``scale * (2^bits - 1)``, the distance between the smallest and the largest code; float32 [R]."""
        return self.scale * largest_code(self.bits)


@dataclass(frozen=True)
class LayerRow:
    """One row of the table of layers.

    Attributes:
        kind: "convolution", "linear" or "attention".
        shape: shape of the weight; () for an attention.
        weight_bits: None for a floating-point weight, and for an attention.
        activation_bits: None for a floating-point input; of an attention, the bits of its operands, with their names
            if they differ.
        rows: table rows, 1 for a static grid; None without a table.
        stored_bytes: size of all its tensors in the checkpoint.
        ranges: smallest and largest `ActivationRange.width`; None without a table, and for an attention.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weight_bits: int | None
    activation_bits: str | None
    rows: int | None
    stored_bytes: int
    ranges: tuple[float, float] | None

    @property
    def weights(self) -> int:
        """Number of weights; 0 for an attention."""
        return math.prod(self.shape) if self.shape else 0


def timesteps_of(denoiser: nn.Module) -> Tensor:
    """Timesteps of the rows of per-step tables, float32 [R], ascending."""
    return next(iter(quantized_modules(denoiser).values())).clock.timesteps


def activation_ranges(denoiser: nn.Module) -> list[ActivationRange]:
    """Every quantized activation, in the order of the modules: inputs of layers, then operands of attentions."""
    ranges = []
    for name, module in quantized_modules(denoiser).items():
        if isinstance(grid := module.layer().input, Grid):
            ranges += _ranges_of(name, grid)
    for name, processor in quantized_attentions(denoiser).items():
        for operand in processor.formats:
            if isinstance(grid := processor.grid(operand), Grid):
                ranges += _ranges_of(f"{name} {operand}", grid)
    return ranges


def _ranges_of(name: str, grid: Grid) -> list[ActivationRange]:
    if len(grid.group_sizes) < 2:
        return [ActivationRange(name, grid.bits, grid.scale[:, 0, 0])]
    edges = [0, *torch.tensor(grid.group_sizes).cumsum(0).tolist()]
    labels = [f"{name} [{start}:{stop}]" for start, stop in pairwise(edges)]
    return [ActivationRange(label, grid.bits, grid.scale[:, group, 0]) for group, label in enumerate(labels)]


def layer_rows(denoiser: nn.Module) -> list[LayerRow]:
    """Every linear, convolution and quantized attention, in the order of the modules."""
    stored = {name: tensor.nbytes for name, tensor in _stored_tensors(denoiser).items()}
    rows = []
    for name, module in denoiser.named_modules():
        own = sum(size for tensor, size in stored.items() if tensor.startswith(f"{name}."))
        if isinstance(module, QuantizedModule):
            layer = module.format
            grid = module.layer().input
            kind = "convolution" if isinstance(module, QuantizedConv) else "linear"
            bits = None if grid is None else str(grid.bits)
            count = None if grid is None else grid.rows
            rows.append(LayerRow(name, kind, module.weight_shape, layer.weight.bits, bits, count, own, _extent(grid)))
        elif can_quantize(module):
            kind = "linear" if isinstance(module, nn.Linear) else "convolution"
            rows.append(LayerRow(name, kind, tuple(module.weight.shape), None, None, None, own, None))
    paths = {module: path for path, module in denoiser.named_modules()}
    for name, processor in quantized_attentions(denoiser).items():
        own = sum(size for tensor, size in stored.items() if tensor.startswith(f"{paths[processor]}."))
        by_operand = {operand: format.bits for operand, format in processor.formats.items()}
        different = len(set(by_operand.values())) > 1
        bits = ", ".join(
            sorted({f"{operand} {count}" if different else str(count) for operand, count in by_operand.items()})
        )
        count = max((grid.rows for grid in processor.formats.values()), default=None)
        rows.append(LayerRow(name, "attention", (), None, bits or None, count, own, None))
    return rows


def _extent(grid: Grid | DynamicGrid | None) -> tuple[float, float] | None:
    if not isinstance(grid, Grid):
        return None
    width = grid.scale * largest_code(grid.bits)
    return float(width.min()), float(width.max())


def weights_by_bits(rows: list[LayerRow]) -> dict[int | None, int]:
    """Bits of the weight, None for floating point -> number of weights; fewest bits first, floating point last."""
    counts: Counter[int | None] = Counter()
    for row in rows:
        if row.shape:
            counts[row.weight_bits] += row.weights
    return dict(sorted(counts.items(), key=lambda item: item[0] or math.inf))


def bytes_by_content(denoiser: nn.Module) -> dict[str, int]:
    """Bytes of the denoiser's tensors in the checkpoint, by what they contain."""
    sizes: Counter[str] = Counter()
    layers = quantized_modules(denoiser)
    kinds = QuantizedAttentionProcessor
    attentions = tuple(f"{name}." for name, module in denoiser.named_modules() if isinstance(module, kinds))
    for name, tensor in _stored_tensors(denoiser).items():
        owner, _, kind = name.partition(".transforms.")[0].rpartition(".")
        owner = name.partition(".transforms.")[0] if ".transforms." in name else owner
        if name.startswith(attentions):
            content = "activation tables"
        elif owner not in layers:
            content = "parameters left in floating point"
        else:
            content = _CONTENTS.get(kind, "activation tables")
        sizes[content] += tensor.nbytes
    return dict(sizes.most_common())


_CONTENTS = {
    "weight_packed": "weights in integers",
    "weight_scale": "weight scales and zero points",
    "weight_zero_point": "weight scales and zero points",
    "bias": "biases of quantized layers",
}


def _stored_tensors(denoiser: nn.Module) -> dict[str, Tensor]:
    return narrow_tensors(denoiser.state_dict(), made_by_quantization(denoiser))
