"""Structural similarity of images."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from stepquant.errors import StepquantError
from stepquant.quality.fidelity import PEAK_TO_PEAK, check_pairs

SSIM_WINDOW = 11


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image, float64 [N] (Wang et al. 2004, Gaussian window of 11, deviation 1.5).

    For images float [N, C, H, W] in [-1, 1]; of video [N, C, F, H, W] the mean over frames. Implementations differ in
    window, color and borders: torchmetrics reflects the borders, scikit-image leaves out half a window, and the two
    differ by some hundredths at 32 x 32. Flat regions score 1 whatever their content.

    Raises:
        StepquantError: if the shapes differ, or the images are smaller than the window.
    """
    check_pairs(images, reference)
    if images.dim() == 5:
        frames = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (images, reference)]
        return ssim(*frames).unflatten(0, (len(images), -1)).mean(dim=1)
    if min(images.shape[-2:]) < SSIM_WINDOW:
        raise StepquantError(
            f"images are {list(images.shape[-2:])} pixels; expected {SSIM_WINDOW} x {SSIM_WINDOW} or more for SSIM."
        )
    value = structural_similarity_index_measure(
        images.double(), reference.double(), data_range=PEAK_TO_PEAK, reduction="none"
    )
    assert isinstance(value, Tensor)
    return value.reshape(len(images))
