"""What a family of denoisers is made of, in the words that calibration and reconstruction need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from stepquant.errors import StepquantError
from stepquant.nn.layers import can_quantize


@dataclass(frozen=True)
class ModelDescription:
    """A denoiser, described by the dotted names of its modules.

    Attributes:
        family: name of the family, for people.
        blocks: the units of reconstruction in execution order: disjoint modules that together hold all of `layers`.
        layers: every linear and convolution that can be quantized, block by block.
        first, last: the layer that reads the noisy sample, and the one that writes the output.
        time_layers: layers whose input depends on the timestep alone.
        attentions: modules of the `Attention` interface of diffusers.
        middle: the module whose output, float [B, C, H, W] or [B, N, C], says most about what is being drawn.
        skip_splits: layer behind a skip concatenation -> number of its input channels that come from the trunk; the
            rest come from the skip.
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
) -> ModelDescription:
    """Complete a description from its blocks: list their layers and attentions, and check that nothing is left out.

    Raises:
        StepquantError: if a layer lies outside every block (a variant of the family that its file does not know).
    """
    layers: list[str] = []
    for block in blocks:
        module = model.get_submodule(block)
        layers += [
            f"{block}.{name}".rstrip(".") for name, submodule in module.named_modules() if can_quantize(submodule)
        ]
    every = {name for name, module in model.named_modules() if can_quantize(module)}
    outside = sorted(every - set(layers))
    if outside:
        raise StepquantError(
            f"{type(model).__name__} has layers that the {family} description does not place in a block: "
            f"{', '.join(outside[:5])}; this variant of the model cannot be quantized yet."
        )
    attentions = [
        name for name, module in model.named_modules() if hasattr(module, "set_processor") and hasattr(module, "to_q")
    ]
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
    )


def main_tensor(output: Any) -> Tensor:
    """The tensor that a block's output stands for: itself, or the first of a tuple."""
    return output if isinstance(output, Tensor) else main_tensor(output[0])
