"""Methods of diffusers' models that work differently, or not at all, on a quantized model."""

from __future__ import annotations

from typing import Any

from stepquant.errors import StepquantError
from stepquant.layers.lora import enable_lora


def adapt_methods(model: Any) -> None:
    """Make LoRAs load on quantized layers, and `fuse_qkv_projections` refuse them; other models do not change."""
    enable_lora(model)
    if hasattr(type(model), "fuse_qkv_projections"):
        model.fuse_qkv_projections = _refuse_fusing


def _refuse_fusing() -> None:
    raise StepquantError(
        "the projections of a quantized model cannot be fused, because each has scales of its own; expected a "
        "full-precision model. Leave out fuse_qkv_projections, or call it on the pipeline before it is quantized."
    )
