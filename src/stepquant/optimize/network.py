"""Train some weights and scales of the quantized network against the full-precision one, the network as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.samples import CalibrationSet
from stepquant.distributed import Ranks
from stepquant.files import digest
from stepquant.models.description import main_tensor
from stepquant.optimize.objectives import LayerOutputs, squared_error
from stepquant.optimize.trainer import Checkpoint, optimize
from stepquant.progress import Progress
from stepquant.settings import Iterations, Positive, Settings, Weight
from stepquant.workspace import Workspace


class Finetuning(Settings):
    """What to train besides the layers' weights, for how long and how fast: by Adam, rates fall to 0 along a cosine."""

    name: str = "Finetuning"
    """In the progress bar."""
    iterations: Iterations = 500
    """Optimizer steps."""
    batch_size: Positive = 16
    """Samples per step."""
    weight_rate: Weight = 1e-3
    """Learning rate of weights, in steps of their grid."""
    bias_rate: Weight = 1e-5
    """Learning rate of biases."""
    scale_rate: Weight = 1e-3
    """Learning rate of the logarithms of activation scales."""
    all_scales: bool = True
    """Train the activation scales of all layers and attentions; else of the trained layers alone."""
    global_weight: Weight = 1.0
    """Weight of the error of the network's output; the trained layers' summed error has weight 1. All errors are
    relative to full precision's own power."""
    over_time: bool = False
    """Learn scales through TDQ's generator and not row by row."""


def finetune(
    full_precision: nn.Module,
    calibrated: CalibrationModel,
    samples: CalibrationSet,
    layers: Sequence[str],
    settings: Finetuning,
    *,
    workspace: Workspace,
    key: str,
    seed: int,
    progress: Progress,
) -> None:
    """Minimise ``sum over layers of |O_l - O~_l|^2 + global_weight |eps - eps~|^2`` (QuEST, arXiv 2402.03666).

    Args:
        full_precision: the original denoiser: run on each batch for its output and its layers' outputs.
        calibrated: the copy to train, its quantizers calibrated; frozen afterwards.
        layers: names of those whose weight and bias are trained, and whose outputs are compared with full precision's,
            each on its own input.
        key: stands for everything that the result depends on besides `seed`.
    """
    ranks = workspace.ranks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parameters = _parameters(calibrated, layers, settings)

        def loss(iteration: int) -> Tensor:
            torch.manual_seed(seed * 100_003 + iteration)
            chosen = torch.randint(len(samples), (min(settings.batch_size, len(samples)),))
            return network_error(full_precision, calibrated, samples, chosen, layers, settings.global_weight, ranks)

        checkpoint = Checkpoint(workspace, f"network-{digest([key, seed])[:16]}")
        with progress.task(settings.name, settings.iterations) as advance:
            optimize(parameters, loss, settings.iterations, ranks=ranks, advance=advance, checkpoint=checkpoint)
    for layer in calibrated.layers.values():
        layer.weight_point.freeze(layer.weight)
        layer.inner.requires_grad_(False)
    for point in calibrated.activation_points():
        point.freeze()


def network_error(
    full_precision: nn.Module,
    calibrated: CalibrationModel,
    samples: CalibrationSet,
    chosen: Tensor,
    layers: Sequence[str],
    global_weight: float,
    ranks: Ranks,
) -> Tensor:
    """The loss of `finetune` over the chosen samples, a scalar; of several processes, this one's part of the sum."""
    minibatch, chosen = len(chosen), chosen[ranks.share(len(chosen))]
    if not len(chosen):
        return ranks.all_reduce(torch.zeros(1 + len(layers))).sum()
    arguments = samples.arguments(chosen)
    originals = {name: full_precision.get_submodule(name) for name in layers}
    with torch.no_grad(), LayerOutputs.recorded(originals) as targets:
        target = main_tensor(full_precision(**arguments, return_dict=False))
    with LayerOutputs.recorded({name: calibrated.layers[name] for name in layers}) as outputs:
        output = main_tensor(calibrated.model(**arguments, return_dict=False))
    share = len(chosen) / minibatch
    wanted = [target, *(targets[name] for name in layers)]
    powers = torch.stack([squared_error(x, torch.zeros_like(x)) * share for x in wanted])
    power = ranks.all_reduce(powers).clamp(min=1e-12)
    missed = torch.stack(
        [
            global_weight * squared_error(output, target),
            *(squared_error(outputs[name], targets[name]) for name in layers),
        ]
    )
    return (missed * share / power).sum()


def _parameters(calibrated: CalibrationModel, layers: Sequence[str], settings: Finetuning) -> list[dict[str, Any]]:
    """Start learning; the parameter groups for the optimizer."""
    trained = [calibrated.layers[name] for name in layers]
    scaled = list(calibrated.activation_points())
    if not settings.all_scales:
        scaled = [layer.input_point for layer in trained if layer.input_point]
    groups = [
        {
            "params": [layer.weight_point.finetune(layer.weight) for layer in trained],
            "lr": settings.weight_rate,
        },
        {
            "params": [layer.inner.bias.requires_grad_() for layer in trained if layer.inner.bias is not None],
            "lr": settings.bias_rate,
        },
        {
            "params": [
                parameter
                for point in scaled
                if point.calibrated
                for parameter in (point.learn_over_time() if settings.over_time else point.learn_table())
            ],
            "lr": settings.scale_rate,
        },
    ]
    return [group for group in groups if group["params"]]
