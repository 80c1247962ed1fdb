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
    static = LayerBits.parse(bits).activation != FLOAT_BITS and spec.activations == "static"
    stages = [CollectSamples(), AddQuantizers(split_skips=True), CalibrateRanges()] if static else [AddQuantizers()]
    state = State()
    for stage in stages:
        stage.run(replace(context, spec=spec), state)
    return state.model.to_quantized()


def left_out_by(spec: QuantSpec) -> dict[str, str]:
    """The overrides that leave layers in floating point."""
    return {pattern: bits for pattern, bits in spec.overrides.items() if LayerBits.parse(bits).is_float}


def with_overrides(spec: QuantSpec, overrides: dict[str, str]) -> QuantSpec:
    """The spec with further overrides, which take precedence over all but `left_out_by`."""
    return spec.model_copy(update={"overrides": left_out_by(spec) | overrides | spec.overrides})
