"""Quantization-aware training: weights, their scales and the activations' intervals together."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from stepquant.calibration.fake_quant.generator import Generation, IntervalGenerator
from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.placement import moved
from stepquant.errors import StepquantError
from stepquant.files import digest
from stepquant.models.description import main_tensor
from stepquant.optimize.batches import Batch, Batches
from stepquant.optimize.trainer import Checkpoint, optimize
from stepquant.progress import Progress
from stepquant.settings import Iterations, Positive, Settings, Weight
from stepquant.workspace import Workspace

SMALLEST_SIZE = 1e-3
"""Of a tensor, for its learning rate: biases of zero must be able to leave it (as in Adafactor, arXiv 1804.04235)."""

REPORTS = 10
"""Lines on how the loss goes, in a whole run."""


class Training(Settings):
    """How long and how fast: by Adam, all rates fall to zero along a cosine."""

    iterations: Iterations = 2000
    """Optimizer steps."""
    batch_size: Positive = 16
    """Images, or points of trajectories, per step."""
    weight_rate: Weight = 1e-3
    """Learning rate of weights, biases, norms and embeddings, relative to the root mean square of each tensor (at least
    `SMALLEST_SIZE`): a step then moves the weights of every layer by the same part of their grid."""
    scale_rate: Weight = 1e-3
    """Learning rate of the logarithms of weight scales, and of activation scales that are static or a table; so
    relative to a scale's size."""
    generator_rate: Weight = 1e-3
    """Learning rate of the networks that generate intervals."""
    over_time: bool = True
    """Generate intervals from the timestep (TDQ); else they are static, or a free table."""
    generation: Generation = Generation(turns=None)
    """How they are generated."""
    from_codes: bool = True
    """Start from the rounded weights, such as GPTQ's; else from the full-precision ones."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Above 0, what ships is the moving average of everything that was trained."""
    clip_norm: Weight = 1.0
    """Gradients of a larger norm are scaled down to it."""


def train(
    calibrated: CalibrationModel,
    batches: Batches,
    training: Training,
    *,
    workspace: Workspace,
    key: str,
    seed: int,
    progress: Progress,
) -> None:
    """Minimise ``|target - denoiser(x_t, t)|^2`` through the quantizers (TDQ, arXiv 2306.02316, section 3.4).

    Gradients pass roundings straight through and reach weight scales by LSQ (arXiv 1902.08153), intervals through the
    networks that generate them. A batch mixes timesteps, so that an activation has an interval for each sample. Several
    processes divide each batch; reported losses are those of this process's part.

    Args:
        calibrated: the copy to train, its quantizers calibrated; frozen afterwards.
        batches: of what it learns from.
        key: stands for all that the result depends on besides `seed`.

    Raises:
        StepquantError: if training diverges.
    """
    model = calibrated.model
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        groups = _release(calibrated, training)
        model.eval()  # no dropout, that of the generators included,
        for generator in model.modules() if training.generation.published else ():
            if isinstance(generator, IntervalGenerator):
                generator.train()  # which the paper has
        _set_memory_format(model, torch.channels_last)
        mean = _Mean(max(1, training.iterations // REPORTS), progress)

        def loss(iteration: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
            batch = batches(iteration, generator, workspace.ranks)
            if batch.share == 0:
                return torch.zeros(())
            torch.manual_seed(seed * 1_000_003 + iteration)  # for the generators' dropout
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16(device)):
                error = denoising_error(model, batch)
            if not bool(torch.isfinite(error)):
                raise StepquantError(
                    f"training diverged: the loss of iteration {iteration + 1} is {error.item()}; "
                    "use lower learning rates."
                )
            mean.add(iteration, error.item())
            return error * batch.share  # the processes' gradients are added up

        with progress.task("Training", training.iterations) as advance:
            optimize(
                groups,
                loss,
                training.iterations,
                ranks=workspace.ranks,
                advance=advance,
                clip_norm=training.clip_norm,
                ema_decay=training.ema_decay,
                checkpoint=Checkpoint(workspace, f"train-{digest([key, seed])[:16]}"),
            )
    _set_memory_format(model, torch.contiguous_format)
    for layer in calibrated.layers.values():
        layer.weight_point.freeze(layer.weight)
    for point in calibrated.activation_points():
        point.freeze()
    model.requires_grad_(False)


def denoising_error(denoiser: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of the denoiser's answer to a batch, a scalar."""
    device = next(denoiser.parameters()).device
    arguments = moved(batch.arguments, device)
    target = batch.target.to(device)
    output = main_tensor(denoiser(**arguments, return_dict=False)).float()
    return (output[:, : target.shape[1]] - target).square().mean()


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware, where it is twice as fast to train in as float32."""
    if device.type == "cpu":
        return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())  # newer versions of torch may lack it
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def _release(calibrated: CalibrationModel, training: Training) -> list[dict[str, Any]]:
    """Let everything learn; the parameter groups for the optimizer."""
    model = calibrated.model
    weights = dict(model.named_parameters())
    for parameter in weights.values():
        parameter.data = parameter.data.float().clone()  # the copy shares the original's weights until they move
        parameter.requires_grad_()
    inside = tuple(f"{name}." for name in calibrated.layers)
    calibrated.trained[:] = [name for name in weights if not name.startswith(inside)]
    scales = [
        parameter
        for layer in calibrated.layers.values()
        for parameter in layer.weight_point.lsq(layer.inner.weight, from_codes=training.from_codes)
    ]
    intervals = [
        parameter
        for point in calibrated.activation_points()
        for parameter in (point.learn_over_time(training.generation) if training.over_time else point.learn_table())
    ]
    interval_rate = training.generator_rate if training.over_time else training.scale_rate
    groups = [
        *({"params": [weight], "lr": training.weight_rate * _size(weight)} for weight in weights.values()),
        {"params": scales, "lr": training.scale_rate},
        {"params": intervals, "lr": interval_rate},
    ]
    return [group for group in groups if group["params"]]


def _size(parameter: Tensor) -> float:
    return max(SMALLEST_SIZE, float(parameter.detach().square().mean().sqrt()))


def _set_memory_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Convolutions train faster with channels last; whatever ships is contiguous."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


class _Mean:
    """Notes the mean loss every so many iterations."""

    def __init__(self, every: int, progress: Progress) -> None:
        self.every, self.progress = every, progress
        self.losses: list[float] = []

    def add(self, iteration: int, loss: float) -> None:
        self.losses.append(loss)
        if (iteration + 1) % self.every == 0:
            self.progress.note(f"iteration {iteration + 1}: loss {sum(self.losses) / len(self.losses):.5f}")
            self.losses.clear()
