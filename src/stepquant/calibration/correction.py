"""Estimate, step by step, how the quantization error follows the denoiser's output (PTQD, arXiv 2305.10657).

    eps~ = (1 + k_t) eps + residual,    k_t = <eps~ - eps, eps> / <eps, eps>

The correlated part is undone by dividing by ``1 + k_t``. What is left is noise of a variance that is measured here, and
that a sampler which adds noise of its own can add the less of.
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
"""Beyond these the output is no prediction any more, and no factor makes it one."""


@torch.no_grad()
def estimate_correction(
    full_precision: nn.Module,
    calibrated: CalibrationModel,
    samples: CalibrationSet,
    batch_size: int,
    progress: Progress,
) -> Correction:
    """The correction of a finished quantization, from samples that it was not fitted to.

    Args:
        full_precision: the original denoiser.
        calibrated: its quantized copy, settled.
        samples: some of every step.
    """
    timesteps, step = samples.tensors["timestep"].float().unique(return_inverse=True)
    products, powers, quantized_powers, values = (torch.zeros(len(timesteps), dtype=torch.float64) for _ in range(4))
    with progress.task("Estimating the output's correction", len(samples)) as advance:
        for chosen in samples.batches(batch_size):
            arguments = samples.arguments(chosen)
            exact, found = (
                main_tensor(model(**arguments, return_dict=False)) for model in (full_precision, calibrated.model)
            )
            channels = predicted_channels(full_precision, exact)
            exact, found = (output[:, :channels].double().flatten(1).cpu() for output in (exact, found))
            for sums, addend in (
                (products, (found * exact).sum(dim=1)),
                (powers, exact.square().sum(dim=1)),
                (quantized_powers, found.square().sum(dim=1)),
                (values, torch.full((len(exact),), float(exact.shape[1]), dtype=torch.float64)),
            ):
                sums.index_add_(0, step[chosen], addend)
            advance(chosen.stop - chosen.start)
    gain = (powers / products).nan_to_num(nan=1.0).clamp(SMALLEST_GAIN, LARGEST_GAIN)
    variance = (gain.square() * quantized_powers - 2 * gain * products + powers) / values
    return Correction(timesteps.cpu(), gain.float().cpu(), variance.clamp(min=0).float().cpu())
