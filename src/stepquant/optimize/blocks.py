"""Block reconstruction: train rounding and activation scales to match each block's full-precision output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from stepquant.calibration.fake_quant.activation_quantizers import QDrop
from stepquant.calibration.fake_quant.layers import CalibratedLayer
from stepquant.calibration.model import CalibrationModel, search_ranges
from stepquant.calibration.placement import staying
from stepquant.calibration.samples import CalibrationSet
from stepquant.core.noise import SampleNoise
from stepquant.core.ranges import Range
from stepquant.core.rounding import annealed_beta
from stepquant.files import digest
from stepquant.models.description import main_tensor
from stepquant.optimize.block import Block
from stepquant.optimize.gptq import gptq
from stepquant.optimize.objectives import LayerOutputs, error
from stepquant.optimize.replay import Replay
from stepquant.optimize.trainer import optimize
from stepquant.progress import Progress
from stepquant.settings import Count, Iterations, Positive, Settings, Share, Weight
from stepquant.workspace import Workspace

HOLD = 0.25
"""Half the width of the part of its cell that a weight starts in when it is moved block by block, in steps."""


class GPTQ(Settings):
    """Round in closed form before scales are learned (`stepquant.optimize.gptq`), then move weights within cells."""

    rate: Weight = 2e-2
    """Learning rate of the weights, in steps of their grid, through the rounding (straight through); 0 leaves them as
    they were rounded."""


class AdaRound(Settings):
    """Learn whether each weight is rounded up or down, together with the scales (arXiv 2004.10568)."""

    rate: Weight = 3e-2
    """Learning rate of the rounding variables."""
    regularizer: Weight = 0.1
    """Weight of the rounding regularizer, relative to the block's error before learning. Errors and regularizer are
    both measured in units of their start (1 each), so that one value serves all layers."""


class LearnScales(Settings):
    """Find the ranges of a block's activations on what reaches them, and learn their scales."""

    method: Range = "least-error"
    rate: Weight = 1e-3
    """Learning rate of the logarithm of each scale, so relative to its size."""
    over_time: Literal["table", "generator"] = "table"
    """How scales depend on the table row, where tables have more than one: ranges found and gains learned row by row,
    or one range for all rows and a network (TDQ) that bends it."""
    neighbours: Count = 0
    """Of a table: calibrated steps on either side whose samples have a say in the range of a step. A step has few
    samples, and a range that fits them alone clips what other images need."""


class Reconstruction(Settings):
    """How a block is reconstructed: by Adam, with rates that fall to 0 along a cosine."""

    iterations: Iterations = 500
    """Optimizer steps per block."""
    batch_size: Positive = 16
    """Samples per step."""
    rounding: GPTQ | AdaRound = GPTQ()
    scales: LearnScales | None = LearnScales()
    """None: activations stay in full precision, and weights alone are reconstructed."""
    drop_probability: Share | None = None
    """QDrop's probability that an element stays in full precision; None: 0.5 under AdaRound, as QDrop has it, and 0
    for GPTQ, whose weights fit the quantized inputs that it would take from them."""
    block_weight: Weight = 1.0
    """Weight of the error of the block's output."""
    layer_weight: Weight = 0.0
    """Weight of the summed errors of its layers' outputs (EDA-DM's beta): all but the final one, which the block's
    output stands for, unless `block_weight` is 0."""

    @property
    def dropped(self) -> float:
        """`drop_probability`, decided."""
        if self.drop_probability is not None:
            return self.drop_probability
        return 0.5 if isinstance(self.rounding, AdaRound) else 0.0


def reconstruct(
    full_precision: nn.Module,
    calibrated: CalibrationModel,
    blocks: tuple[str, ...],
    samples: CalibrationSet,
    settings: Reconstruction,
    *,
    workspace: Workspace,
    key: str,
    seed: int,
    batch_size: int,
    progress: Progress,
) -> None:
    """Reconstruct `blocks` in order, each on what the quantized blocks before it put out.

    A finished block is kept in the workspace; an interrupted run loses at most the block it was in. The workspace's
    processes share the samples and the minibatches.

    Args:
        full_precision: the original denoiser, the source of targets; each of its blocks runs once over the samples.
        calibrated: the copy to learn on; afterwards its quantizers are frozen.
        key: stands for everything that the result depends on besides `seed`.
        batch_size: samples passed through the networks at a time.
    """
    key = digest([key, seed, list(blocks)])[:16]
    ranks = workspace.ranks
    original = Replay(full_precision, samples, batch_size, workspace.scratch("full-precision"), ranks=ranks)
    scratch = workspace.scratch("quantized")
    quantized = Replay(calibrated.model, samples, batch_size, scratch, calibrated.clock, ranks)
    with progress.task("Reconstructing blocks", len(blocks) * settings.iterations) as advance:
        for index, name in enumerate(blocks):
            clean, inputs = original.inputs(name), quantized.inputs(name)
            block = Block(name, full_precision, calibrated, clean, inputs, samples, batch_size, ranks)
            with staying(block.original, block.module):
                target, layer_targets = original.run(name, clean, record=_compared_layers(block, settings))
                stage = f"block-{key}-{index:03d}"
                stored = workspace.load(stage)
                if stored is None:
                    with torch.random.fork_rng(devices=[]):
                        start = seed * 100_003 + index
                        torch.manual_seed(start)
                        _initialize_ranges(block, settings.scales)
                        if isinstance(settings.rounding, GPTQ):
                            gptq(block, block.coarse_layers)
                        _learn(block, LayerOutputs(target, layer_targets), settings, start, advance)
                    workspace.save(stage, _block_state(calibrated, name))
                else:
                    _restore(calibrated, name, stored)
                    advance(settings.iterations)
                quantized.run(name, inputs)


def _compared_layers(block: Block, settings: Reconstruction) -> list[str]:
    """Names of the layers whose outputs are compared with full precision's."""
    if not settings.layer_weight:
        return []
    final = block.final_layer if settings.block_weight else None
    return [name for name in block.layers if name != final]


def _initialize_ranges(block: Block, scales: LearnScales | None) -> None:
    """Find the ranges of the block's activations on what really reaches them, and let their scales learn."""
    if scales is None:
        return
    points = list(block.calibrated.activation_points(block.name))
    for point in points:
        point.observe()
    block.observe()
    per_row = scales.over_time == "table"
    search_ranges(points, scales.method, per_row=per_row, ranks=block.ranks, neighbours=scales.neighbours)
    for point in points:
        # Before GPTQ, which fits the weights to these grids.
        if per_row:
            point.learn_table()
        else:
            point.learn_over_time()


def _learn(
    block: Block, targets: LayerOutputs, settings: Reconstruction, seed: int, advance: Callable[[int], None]
) -> None:
    calibrated, inputs, ranks = block.calibrated, block.inputs, block.ranks
    timesteps = block.samples.tensors["timestep"]
    points = list(calibrated.activation_points(block.name)) if settings.scales else []
    coarse = list(block.coarse_layers.values())
    groups = _weight_groups(coarse, settings.rounding)
    if settings.scales and points:
        gains = [parameter for point in points for parameter in point.parameters_in_training()]
        groups.append({"params": gains, "lr": settings.scales.rate})
    generator = torch.Generator().manual_seed(seed)
    compared = {name: calibrated.layers[name] for name in targets.layers}
    unit: Tensor | None = None

    def loss(iteration: int) -> Tensor:
        nonlocal unit
        minibatch = torch.randint(inputs.samples, (min(settings.batch_size, inputs.samples),), generator=generator)
        share = ranks.share(len(minibatch))
        chosen = minibatch[share]
        missed = torch.zeros(())
        if len(chosen):
            calibrated.clock.set(timesteps[chosen])
            noise = SampleNoise(seed, iteration, range(share.start, share.stop))
            for point in points if settings.dropped else ():
                point.dropout = QDrop(settings.dropped, noise)
            args, kwargs = inputs.mixed(block.clean, chosen, settings.dropped, noise)
            with LayerOutputs.recorded(compared) as layer_outputs:
                outputs = LayerOutputs(main_tensor(block.module(*args, **kwargs)), layer_outputs)
            missed = error(outputs, targets.at(chosen), settings.block_weight, settings.layer_weight)
            missed = missed * (len(chosen) / len(minibatch))
        unit = ranks.all_reduce(missed.detach()).clamp(min=1e-12) if unit is None else unit
        whole = missed / unit
        if ranks.is_main and isinstance(settings.rounding, AdaRound):
            beta = annealed_beta(iteration / settings.iterations)
            weights = max(1, sum(layer.weight.numel() for layer in coarse))
            for layer in coarse:
                whole = whole + settings.rounding.regularizer / weights * layer.weight_point.regularizer(beta)
        return whole

    optimize(
        groups,
        loss,
        settings.iterations,
        ranks=ranks,
        advance=advance,
        schedule=lambda optimizer, iterations, _done: CosineAnnealingLR(optimizer, max(1, iterations)),
        fused=False,
    )
    for layer in coarse:
        layer.weight_point.freeze(layer.weight)
    for point in points:
        point.freeze()
        point.dropout = None


def _weight_groups(layers: list[CalibratedLayer], rounding: GPTQ | AdaRound) -> list[dict[str, Any]]:
    """Start learning the weights of the layers; the optimizer's parameter groups."""
    if not layers or (isinstance(rounding, GPTQ) and rounding.rate == 0):
        return []
    if isinstance(rounding, AdaRound):
        learned = [layer.weight_point.adaround(layer.weight) for layer in layers]
    else:
        learned = [layer.weight_point.finetune(layer.weight, HOLD) for layer in layers]
    return [{"params": learned, "lr": rounding.rate}]


def _block_state(calibrated: CalibrationModel, block: str) -> dict[str, Tensor]:
    """What was learned in one block, by name."""
    state: dict[str, Tensor] = {}
    for name, layer in calibrated.layers_in(block).items():
        state[f"{name}.codes"] = layer.weight_point.codes(layer.weight)
    for index, point in enumerate(calibrated.activation_points(block)):
        if point.calibrated:
            state[f"{index}.scale"], state[f"{index}.zero_point"] = point.scale, point.zero_point
    return state


def _restore(calibrated: CalibrationModel, block: str, state: dict[str, Tensor]) -> None:
    for name, layer in calibrated.layers_in(block).items():
        layer.weight_point.set_codes(state[f"{name}.codes"])
    for index, point in enumerate(calibrated.activation_points(block)):
        if f"{index}.scale" in state:
            point.set_grid(state[f"{index}.scale"], state[f"{index}.zero_point"])
