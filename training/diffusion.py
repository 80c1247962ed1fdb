"""The denoising loss of all reference diffusion models."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from training.loop import autocast


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    clean: Tensor,
    alphas_cumprod: Tensor,
    generator: torch.Generator,
    gamma: float = 5.0,
) -> Tensor:
    """Epsilon prediction with min-SNR weights (arXiv 2303.09556).

    Args:
        predict: ``predict(x_t, t)`` -> the noise; x_t float32 [B, C, H, W], t int64 [B].
        clean: x_0, float32 [B, C, H, W].
        alphas_cumprod: float32 [T] of the scheduler.
        gamma: signal-to-noise ratio above which timesteps get smaller weights.
    """
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    # One timestep from each of B equal strata: the same distribution with a smaller variance.
    batch, steps = clean.shape[0], len(alphas_cumprod)
    strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    timestep = (strata * steps).long().clamp(max=steps - 1)
    alpha = alphas_cumprod[timestep].to(clean.device).view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    with autocast():
        predicted = predict(noisy, timestep.to(clean.device))
    snr = alpha / (1 - alpha)
    weight = (gamma / snr).clamp(max=1)
    return (weight * (predicted.float() - noise).square()).mean()
