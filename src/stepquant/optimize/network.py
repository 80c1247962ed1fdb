"""Train some weights and scales of the quantized network against the full-precision one, the network as a whole."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.samples import CalibrationSet
from stepquant.distributed import Ranks
from stepquant.files import digest, tensors_digest
from stepquant.models.description import main_tensor
from stepquant.optimize.objectives import LayerOutputs, squared_error
from stepquant.optimize.trainer import optimize
from stepquant.progress import Progress
from stepquant.workspace import Workspace


@dataclass(frozen=True)
class Finetuning:
    """What to train, for how long, against what.

    Attributes:
        weights: names of the layers whose weight and bias are trained.
        aligned: names of the layers whose outputs are compared with full precision's, each on its own input.
        scales: names of the layers whose activation scale is trained; None for all layers and attentions.
        name: of the stage, in the progress bar and the workspace.
        iterations: optimizer steps.
        batch_size: samples a step.
        weight_rate: learning rate of weights, in steps of their grid (Adam, cosine to 0).
        bias_rate: learning rate of biases.
        scale_rate: learning rate of the logarithms of activation scales.
        global_weight: weight of the error of the network's output; the aligned layers' summed error has weight 1. All
            errors are relative to full precision's own power.
        over_time: learn scales through TDQ's generator and not row by row.
    """

    weights: tuple[str, ...]
    aligned: tuple[str, ...]
    scales: tuple[str, ...] | None = None
    name: str = "Finetuning"
    iterations: int = 500
    batch_size: int = 16
    weight_rate: float = 1e-3
    bias_rate: float = 1e-5
    scale_rate: float = 1e-3
    global_weight: float = 1.0
    over_time: bool = False


def finetune(
    full_precision: nn.Module,
    calibrated: CalibrationModel,
    samples: CalibrationSet,
    settings: Finetuning,
    *,
    workspace: Workspace,
    key: str,
    seed: int,
    progress: Progress,
) -> None:
    """Minimise ``sum over aligned layers of |O_l - O~_l|^2 + global_weight |eps - eps~|^2`` (QuEST, arXiv 2402.03666).

    Args:
        full_precision: the original denoiser: run on each batch for its output and its layers' outputs.
        calibrated: the copy to train, its quantizers calibrated; frozen afterwards.
        key: stands for everything that the result depends on besides `settings`, `seed` and what has been learned
            so far.
    """
    stage = digest([key, asdict(settings), seed, tensors_digest(calibrated.state())])[:16]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parameters = _parameters(calibrated, settings)

        def loss(iteration: int) -> Tensor:
            torch.manual_seed(seed * 100_003 + iteration)
            chosen = torch.randint(len(samples), (min(settings.batch_size, len(samples)),))
            return network_error(full_precision, calibrated, samples, chosen, settings, workspace.ranks)

        optimize(
            parameters,
            loss,
            settings.iterations,
            workspace=workspace,
            stage=f"network-{stage}",
            description=settings.name,
            progress=progress,
        )
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
    settings: Finetuning,
    ranks: Ranks,
) -> Tensor:
    """The loss of `finetune` over the chosen samples, a scalar; of several processes, this one's part of the sum."""
    minibatch, chosen = len(chosen), chosen[ranks.share(len(chosen))]
    if not len(chosen):
        return ranks.all_reduce(torch.zeros(1 + len(settings.aligned))).sum()
    arguments = samples.arguments(chosen)
    originals = {name: full_precision.get_submodule(name) for name in settings.aligned}
    with torch.no_grad(), LayerOutputs.recorded(originals) as targets:
        target = main_tensor(full_precision(**arguments, return_dict=False))
    with LayerOutputs.recorded({name: calibrated.layers[name] for name in settings.aligned}) as outputs:
        output = main_tensor(calibrated.model(**arguments, return_dict=False))
    share = len(chosen) / minibatch
    wanted = [target, *(targets[name] for name in settings.aligned)]
    power = ranks.all_reduce(torch.stack([squared_error(x, torch.zeros_like(x)) * share for x in wanted])).clamp(
        min=1e-12
    )
    missed = torch.stack(
        [
            settings.global_weight * squared_error(output, target),
            *(squared_error(outputs[name], targets[name]) for name in settings.aligned),
        ]
    )
    return (missed * share / power).sum()


def _parameters(calibrated: CalibrationModel, settings: Finetuning) -> list[dict[str, Any]]:
    """Start learning; the parameter groups for the optimizer."""
    trained = [calibrated.layers[name] for name in settings.weights if name in calibrated.layers]
    scaled = list(calibrated.activation_points())
    if settings.scales is not None:
        scaled = [point for name in settings.scales if (point := calibrated.layers[name].input_point)]
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
