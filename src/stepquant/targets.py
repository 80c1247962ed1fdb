"""Which denoisers of a pipeline to quantize, and to how many bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from stepquant.calibration.allocation import check_budget, weight_sizes
from stepquant.calibration.model import check_overrides
from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.layers.quantized import quantized_modules
from stepquant.models import ModelDescription, denoisers, primary_denoisers
from stepquant.pipelines.request import check_dtype

Spec = QuantSpec | str | Mapping[str, Any]
"""Bits such as ``"w4a8"``, a `QuantSpec` or a dictionary of its attributes; or denoiser -> one of these."""


def parse_specs(pipeline: Any, spec: Spec) -> dict[str, QuantSpec]:
    """Return the spec of each denoiser to quantize, by name, in the pipeline's order.

    One spec holds for all denoisers but ControlNets and adapters.

    Raises:
        StepquantError: for bits that are not understood, or a name that is not a denoiser of the pipeline.
    """
    if not isinstance(spec, Mapping) or not spec or spec.keys() & QuantSpec.model_fields.keys():
        parsed = QuantSpec.parse(spec)  # type: ignore[arg-type]
        return dict.fromkeys(primary_denoisers(pipeline), parsed)
    known = list(denoisers(pipeline))
    for name in spec:
        if name not in known:
            raise StepquantError(
                f"spec names {name!r}, which is not a denoiser of {type(pipeline).__name__}; expected "
                f"{' or '.join(known) or 'a pipeline with a denoiser'}, or attributes of a QuantSpec."
            )
    return {name: QuantSpec.parse(spec[name]) for name in known if name in spec}


def check_quantizable(pipeline: Any, component: str, spec: QuantSpec) -> None:
    """Raise `StepquantError` if a denoiser is quantized already or cannot run in its dtype, or no layer is chosen."""
    if quantized_modules(getattr(pipeline, component)):
        raise StepquantError("the pipeline is quantized already: give the full-precision one.")
    check_dtype(pipeline)
    spec.check_quantizes()


def check_spec(denoiser: nn.Module, description: ModelDescription, spec: QuantSpec, budget: float | None) -> None:
    """Raise `StepquantError` if an override matches no layer, or the budget is out of range."""
    check_overrides(description, spec)
    if budget is not None:
        bits = description.quantized_bits(spec)
        check_budget(spec, bits, weight_sizes(denoiser, bits), budget)
