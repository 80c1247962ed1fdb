"""The same denoiser at other bits with nothing learned: what single layers are raised to."""

from __future__ import annotations

from dataclasses import replace

from stepquant.config import FLOAT_BITS, LayerBits, QuantSpec
from stepquant.layers.install import Quantization
from stepquant.recipes.context import Context
from stepquant.recipes.stage import State
from stepquant.recipes.stages import AddQuantizers, CalibrateRanges, CollectSamples


def rounded(context: Context, bits: str) -> Quantization:
    """Every layer at these bits, rounded to nearest; activations, if static, have one range for all steps.

    Layers that the spec leaves in floating point stay there.
    """
    left_out = left_out_by(context.spec)
    spec = context.spec.model_copy(update={"bits": bits, "overrides": left_out, "smoothing": None, "step_bits": {}})
    return to_nearest(context, spec, AddQuantizers(split_skips=has_static_ranges(spec)))


def to_nearest(context: Context, spec: QuantSpec, add: AddQuantizers) -> Quantization:
    """The denoiser of `context` by another spec, every weight rounded to nearest.

    Args:
        add: places the quantizers.
    """
    state, context = State(), replace(context, spec=spec)
    for stage in [CollectSamples(), add, CalibrateRanges()] if has_static_ranges(spec) else [add]:
        stage.run(context, state)
    return state.model.to_quantized()


def has_static_ranges(spec: QuantSpec) -> bool:
    """Whether a spec quantizes activations to ranges that calibration finds."""
    return spec.default_bits.activation != FLOAT_BITS and spec.activations == "static"


def left_out_by(spec: QuantSpec) -> dict[str, str]:
    """The overrides that leave layers in floating point."""
    return {pattern: bits for pattern, bits in spec.overrides.items() if LayerBits.parse(bits).is_float}


def with_overrides(spec: QuantSpec, overrides: dict[str, str]) -> QuantSpec:
    """The spec with further overrides, which take precedence over all but `left_out_by`."""
    return spec.model_copy(update={"overrides": left_out_by(spec) | overrides | spec.overrides})
