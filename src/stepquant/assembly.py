"""Put a quantization into a copy of its pipeline."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from diffusers import ConfigMixin, SchedulerMixin
from torch import nn
from transformers import PreTrainedTokenizerBase

from stepquant.calibration.placement import device_of
from stepquant.checkpoint.format import FORMAT_VERSION, QUANT_METHOD
from stepquant.config import QuantSpec
from stepquant.layers.install import Quantization, install
from stepquant.pipelines.corrected_scheduler import correct_sampler
from stepquant.runtime import Backend, prepare


def quantized_copy(
    original: nn.Module,
    quantization: Quantization,
    spec: QuantSpec,
    provenance: dict[str, Any],
    backend: Backend = "auto",
) -> Any:
    """Return a copy of a denoiser that carries `quantization` and has its kernels."""
    # What is replaced anyway is not copied: the copy gets layers without memory in those places.
    replaced = (original.get_submodule(name) for name in quantization.layers)
    denoiser: Any = copy.deepcopy(original, {id(layer): copy.deepcopy(layer).to("meta") for layer in replaced})
    denoiser.eval().requires_grad_(False)
    install(denoiser, quantization)
    if device_of(original).type not in ("cpu", "meta"):
        denoiser.to(device_of(original))
    if isinstance(denoiser, ConfigMixin):
        denoiser.register_to_config(
            quantization_config={
                "quant_method": QUANT_METHOD,
                "format_version": FORMAT_VERSION,
                "spec": spec.model_dump(mode="json"),
                "structure": quantization.structure(),
                "provenance": provenance,
            }
        )
    prepare(denoiser, backend)
    return denoiser


def assemble(
    pipeline: Any,
    component: str,
    quantization: Quantization,
    spec: QuantSpec,
    provenance: dict[str, Any],
    backend: Backend = "auto",
) -> Any:
    """Return a copy of `pipeline` of which one denoiser carries `quantization` and has its kernels."""
    denoiser = quantized_copy(getattr(pipeline, component), quantization, spec, provenance, backend)
    return pipeline_with(pipeline, {component: denoiser})


def record_in(denoiser: Any, entries: Mapping[str, Any]) -> None:
    """Add entries to the provenance of a quantized denoiser."""
    if isinstance(denoiser, ConfigMixin):
        stored = dict(denoiser.config["quantization_config"])
        stored["provenance"] = {**stored["provenance"], **entries}
        denoiser.register_to_config(quantization_config=stored)


def pipeline_with(pipeline: Any, denoisers: Mapping[str, nn.Module]) -> Any:
    """Return a copy of `pipeline` with these denoisers, by name."""
    changed = copy.copy(pipeline)
    # Schedulers and tokenizers have state: with copies of them the pipeline can run beside the original.
    own = {
        name: copy.deepcopy(part)
        for name, part in pipeline.components.items()
        if isinstance(part, SchedulerMixin | PreTrainedTokenizerBase)
    }
    changed.register_modules(**own | dict(denoisers))
    for denoiser in denoisers.values():
        correct_sampler(changed, denoiser)
    return changed
