"""TDAC of EDA-DM (arXiv 2401.04585): distribute the calibration samples over the denoising steps.

Steps whose features resemble those of many others represent much of sampling (density). Steps that differ from the rest
contain what no other step shows (diversity). Both get more samples.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.errors import StepquantError
from stepquant.layers.clock import TimestepReader
from stepquant.models.description import main_tensor
from stepquant.pipelines.call import takes_batches
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
    """Record the output of the denoiser's middle at each step while images are generated.

    A step that calls the denoiser more than once (PNDM, Heun, two passes of guidance) contributes the mean.

    Args:
        middle: the module of `denoiser` to record; its output is [B, C, H, W] or [B, N, C].
        images: number of images.

    Returns:
        float32 [T, images, positions, C].
    """
    timestep_of = TimestepReader.of(denoiser)
    parts = [range(images)] if takes_batches(pipeline) else [range(image, image + 1) for image in range(images)]
    count = StepCounter()
    recorded: dict[int, list[Tensor]] = defaultdict(list)

    def see(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        count.see(timestep_of(args, kwargs))

    def record(_module: nn.Module, _inputs: object, output: Any) -> None:
        features = main_tensor(output).detach().float()
        recorded[count.step].append(features.flatten(2).transpose(1, 2) if features.dim() == 4 else features)

    found = []
    handles = [denoiser.register_forward_pre_hook(see, with_kwargs=True), middle.register_forward_hook(record)]
    try:
        with progress.task("Recording features of the steps", images * request.steps) as advance:
            for part in parts:
                on_step = partial(advance, len(part))
                generate(pipeline, request, part, seed, decode=False, on_step=on_step, split=False)
                found.append(torch.stack([torch.stack(calls).mean(dim=0) for calls in recorded.values()]))
                recorded.clear()
                count = StepCounter()
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(found, dim=1).cpu()


def density(features: Tensor, quantile: float = 0.3, radius: float | None = None) -> Tensor:
    """Number of other steps within a radius of each step, scaled to [0, 1].

    Args:
        features: float [T, ...].
        quantile: the radius is this quantile of all pairwise mean squared distances, so that it adapts to the model;
            it is used where no radius is given.
        radius: of a mean squared distance; the paper sets one per model (3.0 on CIFAR-10, 0.3 on most latent models).

    Returns:
        float32 [T].
    """
    flat = features.flatten(1)
    distance = torch.cdist(flat, flat).square() / flat.shape[1]
    others = ~torch.eye(len(flat), dtype=torch.bool)
    limit = distance[others].quantile(quantile) if radius is None else torch.tensor(radius)
    return _scaled(((distance <= limit) & others).sum(dim=1).float())


def diversity(features: Tensor) -> Tensor:
    """Summed cosine distance of each step's features from those of all others, scaled to [0, 1].

    Args:
        features: float [T, B, positions, C]; cosines are taken over C and averaged over the rest.

    Returns:
        float32 [T].
    """
    directions = F.normalize(features, dim=-1)
    # The sum over j of cos(F_i, F_j) is the product of F_i's direction with the sum of all directions.
    similarity = (directions * directions.sum(dim=0)).sum(dim=-1).flatten(1).mean(dim=1) - 1
    return _scaled((len(features) - 1) - similarity)


def distribute(weights: Tensor, samples: int) -> Tensor:
    """Distribute N samples in proportion to weights, ``round(p_i N)`` each, by the largest remainder method.

    Args:
        weights: float [T], not negative.
        samples: N.

    Returns:
        int64 [T], which sums to N.
    """
    total = float(weights.sum())
    exact = weights.double() / total * samples if total > 0 else torch.full_like(weights, samples / len(weights))
    counts = exact.floor().long()
    order = (exact - counts).argsort(descending=True, stable=True)
    counts[order[: samples - int(counts.sum())]] += 1
    return counts


def dense_and_diverse_steps(
    features: Tensor,
    samples: int,
    generator: torch.Generator,
    diversity_weight: float = 1.0,
    quantile: float = 0.3,
    radius: float | None = None,
) -> Tensor:
    """Choose the steps of the calibration samples, in proportion to ``D_i + lambda V_i`` (density and diversity).

    Args:
        features: float [T, B, positions, C], from `step_features`.
        diversity_weight: lambda.
        quantile, radius: see `density`.

    Returns:
        int64 [samples], shuffled.

    Raises:
        StepquantError: for fewer than two steps, or fewer samples than steps.
    """
    steps = len(features)
    check_enough(samples, steps)
    counts = distribute(density(features, quantile, radius) + diversity_weight * diversity(features), samples)
    chosen = torch.arange(steps).repeat_interleave(counts)
    return chosen[torch.randperm(samples, generator=generator)]


def check_enough(samples: int, steps: int) -> None:
    """Raise `StepquantError` for fewer than two steps, or fewer samples than steps."""
    if steps < 2 or samples < steps:
        raise StepquantError(
            f"{samples} calibration samples over {steps} steps are too few to select by density and diversity; "
            "expected at least 2 steps, and at least one sample per step."
        )


def _scaled(values: Tensor) -> Tensor:
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else torch.ones_like(values)
