"""Mixed precision: which layers keep 8 bits within a budget of mean weight bits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from torch import nn

from stepquant.calibration.sensitivity import Sensitivity
from stepquant.config import LayerBits, QuantSpec
from stepquant.errors import StepquantError

KEPT_BITS = 8
"""Weight bits, and least activation bits, of a layer that a budget spares."""


def parse_budget(text: str) -> float:
    """``"4.5bits"`` or ``"4.5"`` -> 4.5; raises `StepquantError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:bits?)?", text.strip().lower())
    if match is None:
        raise StepquantError(f"budget {text!r} is not understood: write the mean weight bits, as in 4.5bits.")
    return float(match[1])


def within_budget(spec: QuantSpec, sensitivity: Sensitivity, budget: float) -> QuantSpec:
    """`spec` with overrides for the layers that keep 8 bits; its own overrides come first and win.

    Greedy: in the order of error per weight, each layer of the spec's default bits that still fits. One that causes
    no error gets nothing.

    Args:
        sensitivity: measured at `spec`.
        budget: most weight bits, averaged over all weights of quantized layers (`mean_weight_bits`); layers that have
            other bits than the default keep them and are counted.

    Raises:
        StepquantError: see `check_budget`.
    """
    bits, sizes = sensitivity.bits, sensitivity.sizes
    cheap, dear = spec.default_bits, kept_bits(spec)
    check_budget(spec, bits, sizes, budget)
    spare = sum(sizes[name] * (budget - layer.weight) for name, layer in bits.items())
    worth = {name: error / sizes[name] for name, error in sensitivity.mean.items() if bits[name] == cheap and error > 0}
    kept: dict[str, str] = {}
    for name in sorted(worth, key=lambda name: worth[name], reverse=True):
        cost = sizes[name] * (dear.weight - cheap.weight)
        if cost <= spare:
            spare -= cost
            kept[exact_name(name)] = str(dear)
    return spec.model_copy(update={"overrides": spec.overrides | kept})


def check_budget(spec: QuantSpec, bits: dict[str, LayerBits], sizes: dict[str, int], budget: float) -> None:
    """Raise `StepquantError` if no choice of layers meets the budget, or it exceeds what 8 bits for all would take."""
    least, most = mean_weight_bits(bits, sizes), kept_bits(spec).weight
    if least >= most:
        raise StepquantError(f"every weight has {most} bits already: a budget works with fewer bits, such as w4a8.")
    if not least <= budget <= most:
        shown = math.ceil(least * 1000) / 1000  # rounded up, so that it can be given
        raise StepquantError(
            f"a budget of {budget:g} bits cannot be met: expected {shown:g}, the mean weight bits of the model "
            f"before any layer is spared, to {most}."
        )


def kept_bits(spec: QuantSpec) -> LayerBits:
    """Bits of a layer that a budget spares: w8a8, or w8a16 where activations are in floating point."""
    return LayerBits(KEPT_BITS, max(KEPT_BITS, spec.default_bits.activation))


def mean_weight_bits(bits: dict[str, LayerBits], sizes: dict[str, int]) -> float:
    """Weight bits of the quantized layers, averaged over their weights."""
    return sum(sizes[name] * bits[name].weight for name in bits) / sum(sizes[name] for name in bits)


def weight_sizes(denoiser: nn.Module, layers: Iterable[str]) -> dict[str, int]:
    """name -> number of weights of a full-precision layer."""
    return {name: int(denoiser.get_submodule(name).weight.numel()) for name in layers}  # type: ignore[operator]


def exact_name(layer: str) -> str:
    """The regular expression that is found in this name alone."""
    return f"^{re.escape(layer)}$"
