"""Replace the layers of a full-precision model with quantized layers, empty or filled."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.core.qtensor import QuantizedAttention, QuantizedLayer
from stepquant.errors import StepquantError
from stepquant.layers.attention import QuantizedAttentionProcessor
from stepquant.layers.clock import StepClock
from stepquant.layers.correction import Correction, OutputCorrection, correction_of
from stepquant.layers.format import OPERANDS, LayerFormat, Structure
from stepquant.layers.interception import install_attention, quantized_attentions
from stepquant.layers.linear import QuantizedLinear
from stepquant.layers.methods import adapt_methods
from stepquant.layers.quantized import QuantizedModule, empty_like, replace_module
from stepquant.layers.time_cache import TimeCache, TimeLinear


@dataclass(frozen=True)
class Quantization:
    """Result of calibrating one denoiser.

    Attributes:
        timesteps: float32 [R], ascending, timesteps of the rows of per-step tables ([1] if all are static).
        layers: module name -> integers and grids.
        attentions: name of an attention (see `stepquant.layers.interception`) -> grids of its operands.
        time_layers: names of linears whose input depends on the timestep alone.
        correction: correction of the denoiser's output, if one was estimated.
        parameters: floating-point parameters that training changed, such as those of norms.
        timestep: name of the timestep among the parameters of the denoiser's forward.
    """

    timesteps: Tensor
    layers: dict[str, QuantizedLayer]
    attentions: dict[str, QuantizedAttention] = field(default_factory=dict)
    time_layers: tuple[str, ...] = ()
    correction: Correction | None = None
    parameters: dict[str, Tensor] = field(default_factory=dict)
    timestep: str = "timestep"

    def structure(self) -> dict[str, Any]:
        """JSON-able `Structure` of this quantization."""
        attentions = {
            name: {operand: grid.format for operand in OPERANDS if (grid := getattr(attention, operand)) is not None}
            for name, attention in self.attentions.items()
        }
        structure = Structure(
            timesteps=self.timesteps.tolist(),
            layers={name: LayerFormat.of(layer) for name, layer in self.layers.items()},
            attentions=attentions,
            time_layers=list(self.time_layers),
            correction_rows=0 if self.correction is None else len(self.correction.timesteps),
            timestep=self.timestep,
        )
        # Releases before this field read the structures that do not need it.
        return structure.model_dump(mode="json", exclude={"timestep"} if self.timestep == "timestep" else set())


def install(model: nn.Module, quantization: Quantization) -> StepClock:
    """Replace layers of the full-precision `model`, in place, with filled quantized ones; returns the model's clock.

    Kernels are not installed; call ``stepquant.runtime.prepare``.
    """
    clock = install_empty(model, quantization.structure())
    for name, layer in quantization.layers.items():
        module = model.get_submodule(name)
        assert isinstance(module, QuantizedModule)
        module.fill(layer)
    installed = quantized_attentions(model)
    for name, attention in quantization.attentions.items():
        installed[name].fill(attention)
    correction = correction_of(model)
    if correction is not None and quantization.correction is not None:
        correction.fill(quantization.correction)
    for name, value in quantization.parameters.items():
        model.get_parameter(name).data.copy_(value)
    return clock


def install_empty(model: nn.Module, structure: Structure | dict[str, Any], device: str = "cpu") -> StepClock:
    """Replace the layers named by `structure` with empty quantized ones, to be filled from a state dict.

    On ``device="meta"`` nothing is allocated: fill with ``load_state_dict(..., assign=True)``.

    Raises:
        StepquantError: if `structure` is malformed, or names a layer that `model` does not have or of another kind.
    """
    structure = Structure.parse(structure)
    with torch.device("cpu"):  # transformers builds models under the meta device
        clock = StepClock(torch.tensor(structure.timesteps, dtype=torch.float32))
    with torch.device(device):
        for name, layer_format in structure.layers.items():
            module = _submodule(model, name)
            try:
                replace_module(model, name, empty_like(module, layer_format, clock))
            except StepquantError as error:
                raise StepquantError(f"layer {name!r}: {error}") from None
        for name, operands in structure.attentions.items():
            install_attention(model, name, QuantizedAttentionProcessor(operands, clock))
        for name in structure.time_layers:
            cache_by_time(model, name, clock)
        if structure.correction_rows:
            OutputCorrection(structure.correction_rows, clock).attach(model)
    if structure.timestep in inspect.signature(model.forward).parameters:  # not a text encoder or autoencoder
        clock.attach(model, structure.timestep)
    adapt_methods(model)
    return clock


def cache_by_time(model: nn.Module, name: str, clock: StepClock) -> None:
    """Make the time layer `name`, a linear, cache its outputs by timestep."""
    module = _submodule(model, name)
    if isinstance(module, QuantizedLinear):
        module.time_cache = TimeCache()
    elif isinstance(module, nn.Linear):
        replace_module(model, name, TimeLinear.like(module, clock))
    else:
        raise StepquantError(f"time layer {name!r} is a {type(module).__name__}; expected a linear.")


def made_by_quantization(model: nn.Module) -> tuple[str, ...]:
    """Name prefixes of tensors that quantization created: of layers, attentions and the output correction."""
    kinds = (QuantizedModule, QuantizedAttentionProcessor, OutputCorrection)
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, kinds))


def _submodule(model: nn.Module, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise StepquantError(f"the model has no layer {name!r}; the checkpoint belongs to another model.") from None
