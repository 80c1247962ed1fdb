"""Block reconstruction: train rounding and activation scales to match each block's full-precision output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.activation_quantizers import QDrop
from stepquant.calibration.fake_quant.layers import CalibratedLayer
from stepquant.calibration.model import CalibrationModel, search_ranges
from stepquant.calibration.placement import staying
from stepquant.calibration.samples import CalibrationSet
from stepquant.core.noise import SampleNoise
from stepquant.files import digest
from stepquant.models.description import main_tensor
from stepquant.optimize.block import Block
from stepquant.optimize.gptq import gptq
from stepquant.optimize.masks import separate_masks
from stepquant.optimize.objectives import LayerOutputs, error
from stepquant.optimize.reconstruction import GPTQ, AdaRound, LearnScales, Reconstruction
from stepquant.optimize.replay import BlockOutputs, Replay
from stepquant.optimize.trainer import by_group, optimize
from stepquant.progress import Progress
from stepquant.workspace import Workspace

HOLD = 0.25
"""Half the width of the part of its cell that a weight starts in when it is moved block by block, in steps."""

CUT_SAMPLES = 64
"""Samples that the cut of soft roundings is measured on."""


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
    samples = separate_masks(full_precision, samples)
    key = digest([key, seed, list(blocks)])[:16]
    ranks = workspace.ranks
    original = Replay(full_precision, samples, batch_size, workspace.scratch("full-precision"), ranks=ranks)
    scratch = workspace.scratch("quantized")
    quantized = Replay(calibrated.model, samples, batch_size, scratch, calibrated.clock, ranks)
    left_alone = frozenset(() if settings.time_layers else calibrated.time_layers)
    cuts: dict[str, float] = {}
    with progress.task("Reconstructing blocks", len(blocks) * settings.iterations) as advance:
        for index, name in enumerate(blocks):
            clean, inputs = original.inputs(name), quantized.inputs(name)
            block = Block(name, full_precision, calibrated, clean, inputs, samples, batch_size, ranks, left_alone)
            with staying(block.original, block.module):
                compared = _compared_layers(block, settings)
                targets = original.run(name, clean, compared)
                stage = f"block-{key}-{index:03d}"
                stored = workspace.load(stage)
                if stored is None:
                    with torch.random.fork_rng(devices=[]):
                        start = seed * 100_003 + index
                        torch.manual_seed(start)
                        _initialize_ranges(block, settings.scales)
                        if isinstance(settings.rounding, GPTQ):
                            gptq(block, block.layers_below(settings.rounding.below))
                        cuts[name] = _learn(block, targets, compared, settings, start, advance)
                    workspace.save(stage, _block_state(calibrated, name))
                else:
                    _restore(calibrated, name, stored)
                    advance(settings.iterations)
                quantized.run(name, inputs)
    _report_cuts(cuts, progress)


def _report_cuts(cuts: dict[str, float], progress: Progress) -> None:
    """Note by how much deciding the soft roundings at the end changed the blocks' errors, where any was soft."""
    cuts = {name: cut for name, cut in cuts.items() if cut != 1.0}
    if cuts:
        worst = max(cuts, key=lambda name: cuts[name])
        progress.note(
            f"deciding the soft roundings multiplied the errors of {len(cuts)} blocks by "
            f"{geometric_mean(cuts.values()):.2f} (geometric mean), at most by {cuts[worst]:.2f} ({worst})."
        )


def _compared_layers(block: Block, settings: Reconstruction) -> list[str]:
    """Names of the layers whose outputs are compared with full precision's."""
    if not settings.layer_weight:
        return []
    left_out = block.final_layer if settings.left_out == "final" else block.last_layer
    return [name for name in block.layers if not settings.block_weight or name != left_out]


def _initialize_ranges(block: Block, scales: LearnScales | None) -> None:
    """Find the ranges of the block's activations on what really reaches them, and let their scales learn."""
    if scales is None:
        return
    points, per_row = block.points, scales.over_time == "table"
    if scales.calibrate:
        for point in points:
            point.observe()
        block.observe()
        search_ranges(
            points,
            scales.method,
            per_row=per_row,
            ranks=block.ranks,
            neighbours=scales.neighbours,
            row_zero_points=scales.generation.zero_points,
        )
    for point in points:
        # Before GPTQ, which fits the weights to these grids.
        if per_row:
            point.learn_table(relative=scales.relative)
        else:
            point.learn_over_time(scales.generation)


def _learn(
    block: Block,
    targets: BlockOutputs,
    layers: Sequence[str],
    settings: Reconstruction,
    seed: int,
    advance: Callable[[int], None],
) -> float:
    """Learn the weights and scales of a block; returns what deciding soft roundings multiplied its error by."""
    calibrated, inputs, ranks, rounding = block.calibrated, block.inputs, block.ranks, settings.rounding
    timesteps = block.samples.timesteps
    points = block.points if settings.scales else []
    learned = list(block.layers_below(rounding.below).values()) if rounding else []
    groups = _parameter_groups(learned, points, settings)
    generator = torch.Generator().manual_seed(seed)
    compared = {name: calibrated.layers[name] for name in layers}
    unit: Tensor | None = None

    def missed_by(chosen: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        calibrated.clock.set(timesteps[chosen])
        with LayerOutputs.recorded(compared) as layer_outputs:
            outputs = LayerOutputs(main_tensor(block.module(*args, **kwargs)), layer_outputs)
        return error(outputs, targets.at(chosen), settings.block_weight, settings.layer_weight, settings.power)

    def loss(iteration: int) -> Tensor:
        nonlocal unit
        minibatch = block.samples.minibatch(min(settings.batch_size, len(block.samples)), generator)
        share = ranks.share(len(minibatch))
        chosen = minibatch[share]
        missed = torch.zeros(())
        if len(chosen):
            torch.manual_seed(seed + iteration)  # for a generator's dropout
            noise = SampleNoise(seed, iteration, range(share.start, share.stop))
            for point in points if settings.dropped else ():
                point.dropout = QDrop(settings.dropped, noise)
            args, kwargs = inputs.mixed(block.clean, chosen, settings.dropped, noise)
            missed = missed_by(chosen, args, kwargs) * (len(chosen) / len(minibatch))
        unit = ranks.all_reduce(missed.detach()).clamp(min=1e-12) if unit is None else unit
        whole = missed if published else missed / unit
        if ranks.is_main and isinstance(rounding, AdaRound):
            weights = max(1, sum(layer.weight.numel() for layer in learned))
            factor, beta = rounding.weight_and_beta(iteration / settings.iterations, weights)
            for layer in learned if factor else ():
                whole = whole + factor * layer.weight_point.regularizer(beta)
        return whole

    @torch.no_grad()
    def error_now() -> float:
        chosen = torch.arange(min(CUT_SAMPLES, inputs.ranges.sizes[0]))
        return max(1e-12, float(missed_by(chosen, *inputs.at(chosen))))

    published = isinstance(rounding, AdaRound) and rounding.published
    schedule = by_group if published else _cosine
    optimize(groups, loss, settings.iterations, ranks=ranks, advance=advance, schedule=schedule, fused=False)
    soft = error_now() if learned and isinstance(rounding, AdaRound) and settings.iterations else None
    for layer in learned:
        layer.weight_point.freeze(layer.weight)
    cut = 1.0 if soft is None else error_now() / soft
    for point in points:
        point.freeze()
        point.dropout = None
    return cut


def _cosine(optimizer: torch.optim.Optimizer, iterations: int, _done: int) -> CosineAnnealingLR:
    return CosineAnnealingLR(optimizer, max(1, iterations))


def _parameter_groups(
    learned: list[CalibratedLayer], points: list[ActivationPoint], settings: Reconstruction
) -> list[dict[str, Any]]:
    """Start learning weights and scales; the optimizer's parameter groups."""
    groups = _weight_groups(learned, settings.rounding)
    if settings.scales and points:
        gains = [parameter for point in points for parameter in point.parameters_in_training()]
        groups.append({"params": gains, "lr": settings.scales.rate})
    return groups


def _weight_groups(layers: list[CalibratedLayer], rounding: GPTQ | AdaRound | None) -> list[dict[str, Any]]:
    if not layers or rounding is None or (isinstance(rounding, GPTQ) and rounding.rate == 0):
        return []
    if isinstance(rounding, AdaRound):
        learned = [layer.weight_point.adaround(layer.weight) for layer in layers]
    else:
        learned = [layer.weight_point.finetune(layer.weight, HOLD) for layer in layers]
    fixed = isinstance(rounding, AdaRound) and not rounding.decay
    return [{"params": learned, "lr": rounding.rate, "constant": fixed}]


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
