"""Model families. A new architecture takes one file that describes it, and one entry here."""

from __future__ import annotations

from torch import nn

from stepquant.errors import StepquantError
from stepquant.models.denoisers import denoiser_name, denoisers, primary_denoisers
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
"""Class name of a denoiser -> function that describes it; any other is described by its structure."""


def describe(model: nn.Module) -> ModelDescription:
    """Return the description of a denoiser; raises `StepquantError` if its class and structure are both unknown."""
    return FAMILIES.get(type(model).__name__, describe_generic)(model)


def register(denoiser: type[nn.Module], describer: Describer) -> None:
    """Describe the denoisers of a class by `describer` in this process.

    Raises:
        StepquantError: if another function already describes the class.
    """
    known = FAMILIES.setdefault(denoiser.__name__, describer)
    if known is not describer:
        raise StepquantError(
            f"{denoiser.__name__} is already described by {known.__module__}.{known.__name__}; expected a new class."
        )


MOST_SAMPLES = 8
"""Samples per call of the denoiser; on two cores, twice as many were no faster."""
MOST_POSITIONS = 1 << 14
"""Pixels or latent positions per call: four samples at 64x64, one at 128x128."""


def chunk_size(denoiser: nn.Module) -> int:
    """Return the number of samples per call of the denoiser during calibration.

    It depends on the model alone and is not a setting: the order of additions in a kernel depends on the batch size, so
    that other batches would give other rounding errors, and finally other integers.
    """
    size = getattr(denoiser, "config", {}).get("sample_size") or 64
    height, width = (size, size) if isinstance(size, int) else (size[-2], size[-1])
    return max(1, min(MOST_SAMPLES, MOST_POSITIONS // (height * width)))


__all__ = [
    "FAMILIES",
    "Describer",
    "ModelDescription",
    "chunk_size",
    "denoiser_name",
    "denoisers",
    "describe",
    "describe_blocks",
    "primary_denoisers",
    "register",
]
