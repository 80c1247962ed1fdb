"""The loss of rectified flows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from training.loop import autocast


def flow_loss(predict: Callable[[Tensor, Tensor], Tensor], clean: Tensor, generator: torch.Generator) -> Tensor:
    """Velocity prediction at times with a logit-normal distribution (arXiv 2403.03206, section 3.1).

    Args:
        predict: ``predict(x_t, t)`` -> noise - x_0; x_t = (1 - s) x_0 + s noise float32 [B, C, H, W], t = 1000 s [B].
        clean: x_0, float32 [B, C, H, W].
    """
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    # One time from each of B equal strata: the same distribution with a smaller variance.
    batch = clean.shape[0]
    strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    normal = torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4))
    sigma = torch.sigmoid(normal).to(clean.device)
    share = sigma.view(-1, 1, 1, 1)
    with autocast():
        predicted = predict((1 - share) * clean + share * noise, 1000 * sigma)
    return (predicted.float() - (noise - clean)).square().mean()
