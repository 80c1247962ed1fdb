"""Weight-only quantization of a pipeline's other models: text encoders and autoencoder."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.integrations.diffusers import StepquantConfig
from stepquant.integrations.transformers import StepquantHfQuantizer
from stepquant.integrations.weight_only import quantize_weights
from stepquant.layers.quantized import quantized_modules
from stepquant.models.denoisers import modules, primary_denoisers
from stepquant.runtime import Backend, prepare

Also = Mapping[str, QuantSpec | str | dict[str, Any]]
"""Name of a component -> bits of its weights, such as ``{"text_encoder": "w8a16", "vae": "w8a16"}``."""


def check_components(pipeline: Any, also: Also, chosen: Container[str] = ()) -> dict[str, StepquantConfig]:
    """Parse and check the bits of each component.

    Args:
        chosen: names of the denoisers that are quantized with activations.

    Raises:
        StepquantError: for a name that is not another model of the pipeline, a model that is already quantized, or bits
            that need samples.
    """
    primary = primary_denoisers(pipeline)
    others = [name for name, _ in modules(pipeline) if name not in primary and name not in chosen]
    for name in also:
        if name not in others:
            raise StepquantError(
                f"{type(pipeline).__name__} has no model {name!r} beside its denoiser: "
                f"expected {' or '.join(others) or 'none, since it has no other'}."
            )
        if quantized_modules(getattr(pipeline, name)):
            raise StepquantError(f"{name} is quantized already; expected a full-precision model.")
    return {name: StepquantConfig(spec=QuantSpec.parse(spec)) for name, spec in also.items()}


def quantize_component(model: nn.Module, config: StepquantConfig, backend: Backend = "auto") -> nn.Module:
    """A copy of a model of diffusers or transformers with rounded weights, ready to run and to be saved.

    Parameters that are not quantized are shared with the given model.

    Raises:
        StepquantError: if the model has nothing to quantize.
    """
    shared: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in model.parameters()
    }
    quantized: Any = copy.deepcopy(model, shared)
    config = copy.deepcopy(config)
    config.structure = quantize_weights(quantized, config.spec)
    if isinstance(quantized, PreTrainedModel):
        quantized.config.quantization_config = config
        quantized.hf_quantizer = StepquantHfQuantizer(config)
    else:
        quantized.register_to_config(quantization_config=config.to_dict())
    prepare(quantized, backend)
    return quantized
