"""Estimate the part of the quantization error that is correlated with the denoiser's output (PTQD, arXiv 2305.10657).

    eps~ = (1 + k_t) eps + residual,    k_t = <eps~ - eps, eps> / <eps, eps>

for each step t. Dividing by ``1 + k_t`` removes the correlated part. The residual is noise; its variance is measured
here, so that a stochastic sampler can add that much less noise.
"""

from __future__ import annotations

import torch
from torch import nn

from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.samples import CalibrationSet
from stepquant.layers.correction import Correction, predicted_channels
from stepquant.models.description import main_tensor
from stepquant.progress import Progress

SMALLEST_GAIN, LARGEST_GAIN = 0.5, 2.0
"""Bounds of the gain: beyond them a factor cannot correct the output."""


@torch.no_grad()
def estimate_correction(
    full_precision: nn.Module,
    calibrated: CalibrationModel,
    samples: CalibrationSet,
    batch_size: int,
    progress: Progress,
) -> Correction:
    """Estimate the correction of a quantized model.

    Args:
        full_precision: the original denoiser.
        calibrated: its copy, calibrated and frozen.
        samples: of every step, and not those that the copy was calibrated on.
        batch_size: samples per pass.

    Returns:
        Gain ``1 / (1 + k_t)`` and variance of the residual, float32 [T] each.
    """
    timesteps, step = samples.timesteps.unique(return_inverse=True)
    products, powers, quantized_powers, values = (torch.zeros(len(timesteps), dtype=torch.float64) for _ in range(4))
    with progress.task("Estimating the output correction", len(samples)) as advance:
        for chosen in samples.batches(batch_size):
            arguments = samples.arguments(chosen)
            exact, quantized = (main_tensor(model(**arguments)) for model in (full_precision, calibrated.model))
            channels = predicted_channels(full_precision, exact)
            exact, quantized = (out[:, :channels].double().flatten(1).cpu() for out in (exact, quantized))
            for sums, addend in (
                (products, (quantized * exact).sum(dim=1)),
                (powers, exact.square().sum(dim=1)),
                (quantized_powers, quantized.square().sum(dim=1)),
                (values, torch.full((len(exact),), float(exact.shape[1]), dtype=torch.float64)),
            ):
                sums.index_add_(0, step[chosen], addend)
            advance(chosen.stop - chosen.start)
    gain = (powers / products).nan_to_num(nan=1.0).clamp(SMALLEST_GAIN, LARGEST_GAIN)
    variance = (gain.square() * quantized_powers - 2 * gain * products + powers) / values
    return Correction(timesteps.cpu(), gain.float().cpu(), variance.clamp(min=0).float().cpu())
