"""Model families. Supporting a new architecture is one file that describes it, and one entry here."""

from __future__ import annotations

from torch import nn

from stepquant.errors import StepquantError
from stepquant.models.description import Describer, ModelDescription
from stepquant.models.dit import describe_dit
from stepquant.models.flux import describe_flux
from stepquant.models.generic import describe_generic
from stepquant.models.mmdit import describe_sd3
from stepquant.models.pixart import describe_pixart
from stepquant.models.unet import describe_unet

FAMILIES: dict[str, Describer] = {
    "UNet2DModel": describe_unet,
    "UNet2DConditionModel": describe_unet,
    "DiTTransformer2DModel": describe_dit,
    "PixArtTransformer2DModel": describe_pixart,
    "SD3Transformer2DModel": describe_sd3,
    "FluxTransformer2DModel": describe_flux,
}
"""Class name of a denoiser -> the function that describes it; any other is described by its structure."""

DENOISERS = ("unet", "transformer")
"""Names under which diffusers pipelines hold their denoiser."""


def describe(model: nn.Module) -> ModelDescription:
    """The description of a denoiser; raises `StepquantError` for one that has none and shows none by its structure."""
    return FAMILIES.get(type(model).__name__, describe_generic)(model)


def denoiser_name(pipeline: object) -> str:
    """Name of a diffusers pipeline's denoiser component, ``"unet"`` or ``"transformer"``."""
    for name in DENOISERS:
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise StepquantError(
        f"{type(pipeline).__name__} has no component named {' or '.join(DENOISERS)}: there is no denoiser to quantize."
    )


__all__ = ["DENOISERS", "FAMILIES", "ModelDescription", "denoiser_name", "describe"]
