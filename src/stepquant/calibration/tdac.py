"""TDAC of EDA-DM (arXiv 2401.04585): how many calibration samples each denoising step deserves.

Steps whose features are like many others' stand for much of what sampling visits (density); steps unlike the rest
hold what nothing else shows (diversity). Both get samples.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.errors import StepquantError
from stepquant.models.description import main_tensor
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import Request
from stepquant.pipelines.steps import StepCounter
from stepquant.progress import Progress


def step_features(
    pipeline: Any,
    denoiser: nn.Module,
    middle: nn.Module,
    request: Request,
    images: int,
    seed: int,
    progress: Progress,
) -> Tensor:
    """The middle of the denoiser at each step while `images` images are drawn: float32 [T, B, positions, C].

    Of a step that calls the denoiser more than once (PNDM, Heun, halves of guidance apart) it is the mean.

    Args:
        middle: the module of `denoiser` to look at; its output is [B, C, H, W] or [B, N, C].
    """
    signature = inspect.signature(denoiser.forward)
    count = StepCounter()
    kept: dict[int, list[Tensor]] = defaultdict(list)

    def see(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        count.see(signature.bind(*args, **kwargs).arguments["timestep"])

    def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
        features = main_tensor(output).detach().float()
        kept[count.step].append(features.flatten(2).transpose(1, 2) if features.dim() == 4 else features)

    handles = [denoiser.register_forward_pre_hook(see, with_kwargs=True), middle.register_forward_hook(keep)]
    try:
        with progress.task("Looking at the steps", images * request.steps) as advance:
            generate(pipeline, request, range(images), seed, decode=False, on_step=partial(advance, images))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([torch.stack(calls).mean(dim=0) for calls in kept.values()]).cpu()


def density(features: Tensor, quantile: float = 0.3) -> Tensor:
    """How many other steps lie within a radius of each, scaled to [0, 1]: float32 [T].

    Args:
        features: float [T, ...].
        quantile: the radius is this quantile of all pairwise mean squared distances, so that it adapts to the model;
            the paper sets a number a model (3.0 on CIFAR-10, 0.3 on latent models).
    """
    flat = features.flatten(1)
    distance = torch.cdist(flat, flat).square() / flat.shape[1]
    others = ~torch.eye(len(flat), dtype=torch.bool)
    radius = distance[others].quantile(quantile)
    return _scaled(((distance <= radius) & others).sum(dim=1).float())


def diversity(features: Tensor) -> Tensor:
    """The summed cosine distance of each step's features from all others', scaled to [0, 1]: float32 [T].

    Args:
        features: float [T, B, positions, C]; cosines are taken over C and averaged over the rest.
    """
    directions = F.normalize(features, dim=-1)
    # The sum over j of cos(F_i, F_j) is the product of F_i's direction with the sum of all directions.
    alike = (directions * directions.sum(dim=0)).sum(dim=-1).flatten(1).mean(dim=1) - 1
    return _scaled((len(features) - 1) - alike)


def share_out(weights: Tensor, samples: int) -> Tensor:
    """``round(p_i N)`` samples for each step, repaired to sum to N by largest remainder: int64 [T].

    Args:
        weights: float [T], not negative.
    """
    total = float(weights.sum())
    shares = weights.double() / total * samples if total > 0 else torch.full_like(weights, samples / len(weights))
    counts = shares.floor().long()
    order = (shares - counts).argsort(descending=True, stable=True)
    counts[order[: samples - int(counts.sum())]] += 1
    return counts


def dense_and_diverse_steps(
    features: Tensor, samples: int, generator: torch.Generator, diversity_weight: float = 1.0, quantile: float = 0.3
) -> Tensor:
    """The steps of the calibration samples, ``w_i = D_i + lambda V_i`` of them at step i: int64 [samples], shuffled.

    Args:
        features: float [T, B, positions, C], from `step_features`.
        diversity_weight: lambda.

    Raises:
        StepquantError: if there are fewer than two steps to compare, or fewer samples than steps.
    """
    steps = len(features)
    check_enough(samples, steps)
    counts = share_out(density(features, quantile) + diversity_weight * diversity(features), samples)
    chosen = torch.arange(steps).repeat_interleave(counts)
    return chosen[torch.randperm(samples, generator=generator)]


def check_enough(samples: int, steps: int) -> None:
    """Raise `StepquantError` if there are fewer than two steps to compare, or fewer samples than steps."""
    if steps < 2 or samples < steps:
        raise StepquantError(
            f"{samples} calibration samples over {steps} steps are too few to select by density and diversity: "
            "take at least 2 steps, and at least one sample a step."
        )


def _scaled(values: Tensor) -> Tensor:
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else torch.ones_like(values)
