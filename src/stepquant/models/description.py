"""Description of a denoiser for calibration and reconstruction: blocks, layers and their roles."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.config import LayerBits, QuantSpec
from stepquant.errors import StepquantError
from stepquant.layers.attention import can_quantize_attention
from stepquant.layers.quantized import can_quantize, kept_in_float32


@dataclass(frozen=True)
class ModelDescription:
    """A denoiser, described by the dotted names of its modules.

    Attributes:
        family: display name of the family.
        blocks: units of reconstruction in execution order: disjoint modules that together contain all `layers`.
        layers: all linears and convolutions that can be quantized, block by block. Inside of a block they are in
            registration order; `stepquant.models.tracing.execution_order` observes the order of execution.
        first, last: layer that reads the noisy sample, and layer that writes the output.
        time_layers: layers whose input depends on the timestep alone.
        attentions: modules with diffusers' `Attention` interface whose operands can be quantized. Others, such as
            linear attention, keep their processor, and their operands stay in floating point.
        middle: module whose output, float [B, C, H, W] or [B, N, C], represents the content of the image best.
        skip_splits: layer after a skip concatenation -> number of its input channels that come from the trunk; the
            others come from the skip.
        float32_layers: those of `layers` that stay in floating point because the model's class keeps them in float32
            (`stepquant.layers.quantized.kept_in_float32`).
        time_unit: the denoiser's timestep per timestep of the scheduler: 1, or 1/1000 where it reads t / 1000.
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
    float32_layers: frozenset[str] = frozenset()

    def quantized_bits(self, spec: QuantSpec) -> dict[str, LayerBits]:
        """Return name -> bits of the layers that `spec` quantizes, in the order of `layers`."""
        bits = {}
        for name in self.layers:
            layer = spec.layer_bits(name, first=name == self.first, last=name == self.last)
            exact = name in self.float32_layers or (spec.exact_time and name in self.time_layers)
            if not layer.is_float and not exact:
                bits[name] = layer
        return bits

    def time_layers_in(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return those of `names`, in their order, that are `time_layers`."""
        return tuple(name for name in names if name in self.time_layers)


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
    """Complete a description from its blocks: find their layers and attentions, and check that it fits the model.

    Raises:
        StepquantError: if a layer is outside of all blocks (an unknown variant of the family) or inside of two, or if
            the model does not have a module that is named.
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
            f"the {family} description of {type(model).__name__} has overlapping blocks: {twice[0]} is in two of them."
        )
    every = {name for name, module in modules.items() if can_quantize(module)}
    outside = sorted(every - set(layers))
    if outside:
        raise StepquantError(
            f"{type(model).__name__} has layers outside of the blocks of the {family} description: "
            f"{', '.join(outside[:5])}. This variant of the model is not supported yet."
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
        float32_layers=kept_in_float32(model) & set(layers),
    )


def _check_names(model: nn.Module, family: str, names: list[str], known: Container[str], what: str) -> None:
    """Raise `StepquantError` for the first of `names` that the model does not have."""
    for name in names:
        if name not in known:
            raise StepquantError(
                f"the {family} description names {name!r}, which is not a {what} of this {type(model).__name__}."
            )


def has_layers(module: nn.Module | None) -> bool:
    """Return whether a module contains a layer that can be quantized."""
    return module is not None and any(can_quantize(submodule) for submodule in module.modules())


def numbered(model: nn.Module, name: str) -> list[str]:
    """Return the dotted names of the members of a list of modules."""
    return [f"{name}.{index}" for index in range(len(model.get_submodule(name)))]  # type: ignore[arg-type]


def main_tensor(output: Any) -> Tensor:
    """Return the tensor that represents a block's output: the output itself, or the first of a tuple.

    A joint block outputs text and image, both [B, tokens, C]; they are concatenated along the tokens.
    """
    if isinstance(output, Tensor):
        return output
    tensors = [part for part in output if isinstance(part, Tensor)] if isinstance(output, tuple | list) else []
    if len(tensors) > 1 and all(part.dim() == 3 and part.shape[-1] == tensors[0].shape[-1] for part in tensors):
        return torch.cat(tensors, dim=1)
    return tensors[0] if tensors else main_tensor(output[0])
