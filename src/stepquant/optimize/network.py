"""Train some weights and scales of the quantized network against the full-precision one, the network as a whole."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.layers import CalibratedLayer
from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.samples import CalibrationSet
from stepquant.distributed import Ranks
from stepquant.files import digest
from stepquant.models.description import main_tensor
from stepquant.optimize.objectives import LayerOutputs, squared_error
from stepquant.optimize.trainer import Checkpoint, constant, cosine, optimize
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
    """Learning rate of weights, in steps of their grid; with `published` in their own units."""
    bias_rate: Weight = 1e-5
    """Learning rate of biases."""
    scale_rate: Weight = 1e-3
    """Learning rate of the logarithms of activation scales; with `published` of the scales."""
    all_scales: bool = True
    """Train the activation scales of all layers and attentions; else of the trained layers alone."""
    global_weight: Weight = 1.0
    """Weight of the error of the network's output; the trained layers' summed error has weight 1. All errors are
    relative to full precision's own power."""
    published: bool = False
    """As in QuEST's public code: plain mean squared errors, learning rates of weights and scales in their own units,
    which stay throughout."""
    rounding: Literal["held", "nearest"] = "held"
    """With `published`: weights are rounded in the direction that an earlier stage decided, or to nearest again."""
    over_time: bool = False
    """Learn scales through TDQ's generator and not row by row."""


def finetune(
    full_precision: nn.Module,
    calibrated: CalibrationModel,
    samples: CalibrationSet,
    layers: Sequence[str],
    settings: Finetuning,
    *,
    frozen: Collection[str] = (),
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
        frozen: names of layers whose scales stay as they are.
        key: stands for everything that the result depends on besides `seed`.
    """
    ranks = workspace.ranks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parameters = _parameters(calibrated, layers, settings, frozen)

        def loss(iteration: int) -> Tensor:
            torch.manual_seed(seed * 100_003 + iteration)
            chosen = samples.minibatch(min(settings.batch_size, len(samples)))
            return network_error(
                full_precision, calibrated, samples, chosen, layers, settings.global_weight, ranks,
                published=settings.published,
            )  # fmt: skip

        checkpoint = Checkpoint(workspace, f"network-{digest([key, seed])[:16]}")
        with progress.task(settings.name, settings.iterations) as advance:
            optimize(
                parameters, loss, settings.iterations, ranks=ranks, advance=advance, checkpoint=checkpoint,
                schedule=constant if settings.published else cosine,
            )  # fmt: skip
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
    *,
    published: bool = False,
) -> Tensor:
    """The loss of `finetune` over the chosen samples, a scalar; of several processes, this one's part of the sum."""
    minibatch, chosen = len(chosen), chosen[ranks.share(len(chosen))]
    if not len(chosen):
        nothing = torch.zeros(1 + len(layers))
        return (nothing if published else ranks.all_reduce(nothing)).sum()
    arguments = samples.arguments(chosen)
    originals = {name: full_precision.get_submodule(name) for name in layers}
    with torch.no_grad(), LayerOutputs.recorded(originals) as targets:
        target = main_tensor(full_precision(**arguments))
    with LayerOutputs.recorded({name: calibrated.layers[name] for name in layers}) as outputs:
        output = main_tensor(calibrated.model(**arguments))
    share = len(chosen) / minibatch
    pairs = [(output, target), *((outputs[name], targets[name]) for name in layers)]
    weights = torch.ones(len(pairs), device=output.device)
    weights[0] = global_weight
    if published:
        return (weights * torch.stack([(x - wanted).square().mean() for x, wanted in pairs]) * share).sum()
    powers = torch.stack([squared_error(wanted, torch.zeros_like(wanted)) * share for _, wanted in pairs])
    power = ranks.all_reduce(powers).clamp(min=1e-12)
    return (weights * torch.stack([squared_error(x, wanted) for x, wanted in pairs]) * share / power).sum()


def _parameters(
    calibrated: CalibrationModel, layers: Sequence[str], settings: Finetuning, frozen: Collection[str]
) -> list[dict[str, Any]]:
    """Start learning; the parameter groups for the optimizer."""
    trained = [calibrated.layers[name] for name in layers]
    left = {id(layer.input_point) for name, layer in calibrated.layers.items() if name in frozen}
    scaled = [point for point in calibrated.activation_points() if id(point) not in left]
    if not settings.all_scales:
        scaled = [layer.input_point for layer in trained if isinstance(layer.input_point, ActivationPoint)]

    def learn(point: ActivationPoint) -> list[nn.Parameter]:
        return point.learn_over_time() if settings.over_time else point.learn_table(relative=not settings.published)

    def train(layer: CalibratedLayer) -> nn.Parameter:
        if settings.published:
            return layer.weight_point.train_weight(layer.weight, held=settings.rounding == "held")
        return layer.weight_point.finetune(layer.weight)

    groups = [
        {"params": [train(layer) for layer in trained], "lr": settings.weight_rate},
        {
            "params": [layer.inner.bias.requires_grad_() for layer in trained if layer.inner.bias is not None],
            "lr": settings.bias_rate,
        },
        {
            "params": [parameter for point in scaled if point.calibrated for parameter in learn(point)],
            "lr": settings.scale_rate,
        },
    ]
    return [group for group in groups if group["params"]]
