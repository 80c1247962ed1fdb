"""What a family of denoisers is made of, in the words that calibration and reconstruction need."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.config import LayerBits, QuantSpec
from stepquant.errors import StepquantError
from stepquant.layers.attention import can_quantize_attention
from stepquant.layers.quantized import can_quantize


@dataclass(frozen=True)
class ModelDescription:
    """A denoiser, described by the dotted names of its modules.

    Attributes:
        family: name of the family, for people.
        blocks: the units of reconstruction in execution order: disjoint modules that together hold all of `layers`.
        layers: every linear and convolution that can be quantized, block by block.
        first, last: the layer that reads the noisy sample, and the one that writes the output.
        time_layers: layers whose input depends on the timestep alone.
        attentions: modules of the `Attention` interface of diffusers whose operands can be quantized; others (linear
            attention, masks of their own) keep diffusers' processor, and their operands stay in floating point.
        middle: the module whose output, float [B, C, H, W] or [B, N, C], says most about what is being drawn.
        skip_splits: layer behind a skip concatenation -> number of its input channels that come from the trunk; the
            rest come from the skip.
        time_unit: what the denoiser is given for one timestep of the scheduler: 1, or 1/1000 where it reads t / 1000.
    """

    family: str
    blocks: tuple[str, ...]
    layers: tuple[str, ...]
    first: str
    last: str
    time_layers: frozenset[str]
    attentions: tuple[str, ...]
    middle: str
    skip_splits: dict[str, int]
    time_unit: float = 1.0

    def quantized_bits(self, spec: QuantSpec) -> dict[str, LayerBits]:
        """name -> bits of the layers that `spec` quantizes, in execution order."""
        bits = {}
        for name in self.layers:
            layer = spec.layer_bits(name, first=name == self.first, last=name == self.last)
            if not layer.is_float and not (spec.exact_time and name in self.time_layers):
                bits[name] = layer
        return bits


Describer = Callable[[nn.Module], ModelDescription]


def describe_blocks(
    model: nn.Module,
    family: str,
    blocks: list[str],
    *,
    first: str,
    last: str,
    time_layers: list[str],
    middle: str,
    skip_splits: dict[str, int] | None = None,
    time_unit: float = 1.0,
) -> ModelDescription:
    """Complete a description from its blocks: list their layers and attentions, and check that it fits the model.

    Raises:
        StepquantError: if a layer lies outside every block (a variant of the family that its file does not know) or in
            two, or something is named that the model does not have.
    """
    modules = dict(model.named_modules())
    _check_names(model, family, [*blocks, middle], modules, "module")
    layers: list[str] = []
    for block in blocks:
        layers += [
            f"{block}.{name}".rstrip(".")
            for name, submodule in modules[block].named_modules()
            if can_quantize(submodule)
        ]
    twice = sorted({name for name in layers if layers.count(name) > 1})
    if twice:
        raise StepquantError(
            f"the {family} description of {type(model).__name__} has blocks that overlap: {twice[0]} is in two of them."
        )
    every = {name for name, module in modules.items() if can_quantize(module)}
    outside = sorted(every - set(layers))
    if outside:
        raise StepquantError(
            f"{type(model).__name__} has layers that the {family} description does not place in a block: "
            f"{', '.join(outside[:5])}; this variant of the model cannot be quantized yet."
        )
    _check_names(model, family, [first, last, *time_layers, *(skip_splits or {})], every, "linear or convolution")
    attentions = [name for name, module in modules.items() if can_quantize_attention(module)]
    return ModelDescription(
        family=family,
        blocks=tuple(blocks),
        layers=tuple(layers),
        first=first,
        last=last,
        time_layers=frozenset(time_layers),
        attentions=tuple(attentions),
        middle=middle,
        skip_splits=dict(skip_splits or {}),
        time_unit=time_unit,
    )


def _check_names(model: nn.Module, family: str, names: list[str], known: Container[str], what: str) -> None:
    """Raise `StepquantError` for the first of `names` that the model has not."""
    for name in names:
        if name not in known:
            raise StepquantError(
                f"the {family} description names {name!r}, which is no {what} of this {type(model).__name__}."
            )


def numbered(model: nn.Module, name: str) -> list[str]:
    """Dotted names of the members of a list of modules."""
    return [f"{name}.{index}" for index in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]


def main_tensor(output: Any) -> Tensor:
    """The tensor that a block's output stands for: itself, or the first of a tuple.

    A joint block puts out text and image, both [B, tokens, C]: they are joined along the tokens.
    """
    if isinstance(output, Tensor):
        return output
    tensors = [part for part in output if isinstance(part, Tensor)] if isinstance(output, tuple | list) else []
    if len(tensors) > 1 and all(part.dim() == 3 and part.shape[-1] == tensors[0].shape[-1] for part in tensors):
        return torch.cat(tensors, dim=1)
    return tensors[0] if tensors else main_tensor(output[0])
