"""Model families. Supporting a new architecture is one file that describes it, and one entry here."""

from __future__ import annotations

from torch import nn

from stepquant.errors import StepquantError
from stepquant.models.description import Describer, ModelDescription, describe_blocks
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


def register(denoiser: type[nn.Module], describer: Describer) -> None:
    """Describe denoisers of a class by `describer` from now on, in this process.

    Raises:
        StepquantError: if another function describes the class already: a family has one description.
    """
    known = FAMILIES.setdefault(denoiser.__name__, describer)
    if known is not describer:
        raise StepquantError(f"{denoiser.__name__} is described already, by {known.__name__} of {known.__module__}.")


def denoiser_name(pipeline: object) -> str:
    """Name of a diffusers pipeline's denoiser component, ``"unet"`` or ``"transformer"``."""
    for name in DENOISERS:
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise StepquantError(
        f"{type(pipeline).__name__} has no component named {' or '.join(DENOISERS)}: there is no denoiser to quantize."
    )


MOST_SAMPLES = 8
"""Samples that pass through a denoiser at a time; on two cores twice as many were no faster."""
MOST_POSITIONS = 1 << 14
"""Pixels or latent positions at a time: four samples at 64x64, one at 128x128."""


def chunk_size(denoiser: nn.Module) -> int:
    """How many samples pass through a denoiser at a time while it is calibrated.

    It follows from the model alone and is no setting: kernels add in an order that depends on the size of the batch, so
    other batches would give other last bits, and in the end other integers.
    """
    size = getattr(denoiser, "config", {}).get("sample_size") or 64
    height, width = (size, size) if isinstance(size, int) else (size[-2], size[-1])
    return max(1, min(MOST_SAMPLES, MOST_POSITIONS // (height * width)))


__all__ = [
    "DENOISERS",
    "FAMILIES",
    "Describer",
    "ModelDescription",
    "chunk_size",
    "denoiser_name",
    "describe",
    "describe_blocks",
    "register",
]
