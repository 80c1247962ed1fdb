"""Denoisers of diffusers, described by what one call of them shows."""

from __future__ import annotations

from torch import nn

from stepquant.models.denoisers import denoiser_name, denoisers, primary_denoisers
from stepquant.models.description import ModelDescription, describe

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
    "ModelDescription",
    "chunk_size",
    "denoiser_name",
    "denoisers",
    "describe",
    "primary_denoisers",
]
