"""Mixed precision: choose the layers that keep 8 bits within a budget of mean weight bits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from torch import nn

from stepquant.calibration.sensitivity import Sensitivity
from stepquant.config import LayerBits, QuantSpec
from stepquant.errors import StepquantError

KEPT_BITS = 8
"""Weight bits, and minimum activation bits, of a chosen layer."""


def parse_budget(text: str) -> float:
    """Parse ``"4.5bits"`` or ``"4.5"``; raise `StepquantError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:bits?)?", text.strip().lower())
    if match is None:
        raise StepquantError(f"budget {text!r} is not understood; expected the mean weight bits, such as 4.5bits.")
    return float(match[1])


def within_budget(spec: QuantSpec, sensitivity: Sensitivity, budget: float) -> QuantSpec:
    """Add overrides to `spec` for the layers that keep 8 bits; the overrides of `spec` take precedence.

    Greedy: layers of the default bits, in descending order of error per weight, as long as they fit. Layers without
    error are left out.

    Args:
        sensitivity: measured at `spec`.
        budget: maximum of `mean_weight_bits`; layers with other bits than the default keep them and are counted.

    Raises:
        StepquantError: see `check_budget`.
    """
    bits, sizes = sensitivity.bits, sensitivity.sizes
    low, high = spec.default_bits, kept_bits(spec)
    check_budget(spec, bits, sizes, budget)
    spare = sum(sizes[name] * (budget - layer.weight) for name, layer in bits.items())
    gain = {name: error / sizes[name] for name, error in sensitivity.mean.items() if bits[name] == low and error > 0}
    kept: dict[str, str] = {}
    for name in sorted(gain, key=lambda name: gain[name], reverse=True):
        cost = sizes[name] * (high.weight - low.weight)
        if cost <= spare:
            spare -= cost
            kept[exact_name(name)] = str(high)
    return spec.model_copy(update={"overrides": spec.overrides | kept})


def check_budget(spec: QuantSpec, bits: dict[str, LayerBits], sizes: dict[str, int], budget: float) -> None:
    """Raise `StepquantError` if the budget is below the bits of `spec` or above 8 bits for all layers."""
    least, most = mean_weight_bits(bits, sizes), kept_bits(spec).weight
    if least >= most:
        raise StepquantError(
            f"bits {spec.bits} give every weight {most} bits already; expected fewer with a budget, such as w4a8."
        )
    if not least <= budget <= most:
        shown = math.ceil(least * 1000) / 1000  # rounded up: a valid budget
        raise StepquantError(
            f"a budget of {budget:g} bits cannot be met; expected {shown:g}, the mean weight bits without it, to "
            f"{most}."
        )


def kept_bits(spec: QuantSpec) -> LayerBits:
    """Bits of a chosen layer: w8a8, or w8a16 where activations are in floating point."""
    return LayerBits(KEPT_BITS, max(KEPT_BITS, spec.default_bits.activation))


def mean_weight_bits(bits: dict[str, LayerBits], sizes: dict[str, int]) -> float:
    """Mean bits per weight over all weights of quantized layers."""
    return sum(sizes[name] * bits[name].weight for name in bits) / sum(sizes[name] for name in bits)


def weight_sizes(denoiser: nn.Module, layers: Iterable[str]) -> dict[str, int]:
    """Name -> number of weights of full-precision layers."""
    return {name: int(denoiser.get_submodule(name).weight.numel()) for name in layers}  # type: ignore[operator]


def exact_name(layer: str) -> str:
    """The regular expression that matches only this name."""
    return f"^{re.escape(layer)}$"
