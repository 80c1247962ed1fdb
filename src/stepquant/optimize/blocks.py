"""Block reconstruction: learn rounding and activation scales so that each block puts out what it should."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.activation_quantizers import QDrop
from stepquant.calibration.fake_quant.layers import CalibratedLayer
from stepquant.calibration.model import CalibrationModel, search_ranges
from stepquant.calibration.placement import staying
from stepquant.calibration.samples import CalibrationSet
from stepquant.core.noise import SampleNoise
from stepquant.core.ranges import Range
from stepquant.core.rounding import annealed_beta
from stepquant.distributed import Ranks
from stepquant.files import digest
from stepquant.models.description import main_tensor
from stepquant.optimize.gptq import gptq
from stepquant.optimize.objectives import LayerOutputs, error
from stepquant.optimize.replay import BlockInputs, Replay
from stepquant.progress import Progress
from stepquant.workspace import Workspace

LEARN_ROUNDING_BELOW = 8
"""Bits. At 8, rounding to nearest leaves so little error that compensation or learning adds more than it removes in any
budget tried (``docs/quality.md``); the weights of such layers are only rounded to nearest."""

HOLD = 0.25
"""Half the width of the part of its cell that a weight starts in when it is moved block by block, in steps."""

OverTime = Literal["table", "generator"]
Rounding = Literal["gptq", "adaround"]


@dataclass(frozen=True)
class Settings:
    """How a block is reconstructed.

    Attributes:
        iterations: optimizer steps a block.
        batch_size: samples a step.
        rounding_rate: learning rate of the AdaRound variables (Adam, cosine to 0).
        scale_rate: learning rate of the logarithm of each activation scale, so relative to its size.
        drop_probability: QDrop's probability that an element stays in full precision; None: 0.5 under AdaRound, as
            QDrop has it, and 0 for gptq-rounded weights, which fit the quantized inputs that it would take from them.
        rounding_weight: weight of the rounding regulariser, relative to the block's error before learning. Errors and
            regulariser are both measured in units of their start (1 each), so that one value serves all layers.
        activation_range: how activation ranges are found before learning.
        learn_scales: whether activations are quantized and their scales learned; else weights alone are reconstructed,
            and activations stay in full precision until `Job.calibrate_ranges`.
        over_time: how scales depend on the table row, where tables have more than one: a ``"table"`` of ranges found
            and gains learned row by row, or one range for all rows and a ``"generator"`` (TDQ) that bends it.
        neighbours: of a ``"table"``: calibrated steps on either side whose samples have a say in the range of a step.
            A step has few samples of its own, and a range that fits them alone clips what other images need.
        rounding: how weights are rounded: ``"gptq"``, in closed form before scales are learned
            (`stepquant.optimize.gptq`), or ``"adaround"``, learned together with the scales.
        weight_rate: learning rate of gptq-rounded weights, in steps of their grid, and through the rounding (straight
            through, Adam, cosine to 0); 0 leaves them as they were rounded.
        block_weight: weight of the error of the block's output.
        layer_weight: weight of the summed errors of its layers' outputs (EDA-DM's beta): all but the last, which the
            block's output stands for, unless `block_weight` is 0.
    """

    iterations: int = 500
    batch_size: int = 16
    rounding_rate: float = 3e-2
    scale_rate: float = 1e-3
    drop_probability: float | None = None
    rounding_weight: float = 0.1
    activation_range: Range = "least-error"
    learn_scales: bool = True
    over_time: OverTime = "table"
    neighbours: int = 0
    rounding: Rounding = "gptq"
    weight_rate: float = 2e-2
    block_weight: float = 1.0
    layer_weight: float = 0.0

    @property
    def dropped(self) -> float:
        """`drop_probability`, decided."""
        if self.drop_probability is not None:
            return self.drop_probability
        return 0.5 if self.rounding == "adaround" else 0.0


def reconstruct(
    full_precision: nn.Module,
    calibrated: CalibrationModel,
    blocks: tuple[str, ...],
    samples: CalibrationSet,
    settings: Settings,
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
        key: stands for everything that the result depends on besides `settings` and `seed`.
        batch_size: samples passed through the networks at a time.
    """
    key = digest([key, asdict(settings), seed, list(blocks)])[:16]
    ranks = workspace.ranks
    original = Replay(full_precision, samples, batch_size, workspace.scratch("full-precision"), ranks=ranks)
    scratch = workspace.scratch("quantized")
    quantized = Replay(calibrated.model, samples, batch_size, scratch, calibrated.clock, ranks)
    timesteps = samples.tensors["timestep"]
    with progress.task("Reconstructing blocks", len(blocks) * settings.iterations) as advance:
        for index, block in enumerate(blocks):
            pair = full_precision.get_submodule(block), calibrated.model.get_submodule(block)
            clean = original.inputs(block)
            inputs = quantized.inputs(block)
            layers = list(calibrated.layers_in(block)) if settings.layer_weight else []
            if settings.block_weight:
                layers = layers[:-1]
            with staying(*pair):
                target, layer_targets = original.run(block, clean, record=layers)
                stage = f"block-{key}-{index:03d}"
                stored = workspace.load(stage)
                if stored is None:
                    with torch.random.fork_rng(devices=[]):
                        start = seed * 100_003 + index
                        torch.manual_seed(start)
                        if settings.learn_scales:
                            _initialise_ranges(calibrated, block, inputs, settings, samples, batch_size, ranks)
                        if settings.rounding == "gptq":
                            coarse = _coarse_layers(calibrated, block)
                            passed = (samples, batch_size, ranks)
                            gptq(full_precision, calibrated, block, coarse, clean, inputs, *passed)
                        targets = LayerOutputs(target, layer_targets)
                        _learn(calibrated, block, inputs, clean, targets, timesteps, settings, start, ranks, advance)
                    workspace.save(stage, _block_state(calibrated, block))
                else:
                    _restore(calibrated, block, stored)
                    advance(settings.iterations)
                quantized.run(block, inputs)


def _coarse_layers(calibrated: CalibrationModel, block: str) -> dict[str, CalibratedLayer]:
    """The layers of a block whose rounding is worth more than rounding to nearest."""
    layers = calibrated.layers_in(block).items()
    return {name: layer for name, layer in layers if layer.weight_point.bits < LEARN_ROUNDING_BELOW}


def _initialise_ranges(
    calibrated: CalibrationModel,
    block: str,
    inputs: BlockInputs,
    settings: Settings,
    samples: CalibrationSet,
    batch_size: int,
    ranks: Ranks,
) -> None:
    """Find the ranges of the block's activations on what really reaches them."""
    points = list(calibrated.activation_points(block))
    for point in points:
        point.observe()
    with torch.no_grad():
        batches = list(samples.batches(batch_size))
        for chosen in batches[ranks.share(len(batches))]:
            args, kwargs = inputs.at(chosen)
            calibrated.clock.set(samples.tensors["timestep"][chosen])
            calibrated.model.get_submodule(block)(*args, **kwargs)
    per_row, neighbours = settings.over_time == "table", settings.neighbours
    search_ranges(points, settings.activation_range, per_row=per_row, ranks=ranks, neighbours=neighbours)
    for point in points:
        # Before GPTQ, which fits the weights to these grids.
        if settings.over_time == "generator":
            point.learn_over_time()
        else:
            point.learn_table()


def _learn(
    calibrated: CalibrationModel,
    block: str,
    inputs: BlockInputs,
    clean: BlockInputs,
    targets: LayerOutputs,
    timesteps: Tensor,
    settings: Settings,
    seed: int,
    ranks: Ranks,
    advance: Any,
) -> None:
    module = calibrated.model.get_submodule(block)
    points = list(calibrated.activation_points(block)) if settings.learn_scales else []
    moved: list[CalibratedLayer] = []
    coarse = list(_coarse_layers(calibrated, block).values()) if settings.rounding == "adaround" else []
    roundings = [layer.weight_point.adaround(layer.weight) for layer in coarse]
    weights = max(1, sum(rounding.numel() for rounding in roundings))
    groups: list[dict[str, Any]] = []
    if roundings:
        groups.append({"params": roundings, "lr": settings.rounding_rate})
    if settings.rounding == "gptq" and settings.weight_rate > 0:
        moved = list(_coarse_layers(calibrated, block).values())
        shifts = [layer.weight_point.finetune(layer.weight, HOLD) for layer in moved]
        groups += [{"params": shifts, "lr": settings.weight_rate}] if shifts else []
    if points:
        gains = [parameter for point in points for parameter in point.parameters_in_training()]
        groups.append({"params": gains, "lr": settings.scale_rate})
    if not groups:
        advance(settings.iterations)
        return
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, settings.iterations))
    generator = torch.Generator().manual_seed(seed)
    unit: Tensor | None = None
    learned = {name: calibrated.layers[name] for name in targets.layers}
    for iteration in range(settings.iterations):
        minibatch = torch.randint(inputs.samples, (min(settings.batch_size, inputs.samples),), generator=generator)
        share = ranks.share(len(minibatch))
        chosen = minibatch[share]
        missed = torch.zeros(())
        if len(chosen):
            calibrated.clock.set(timesteps[chosen])
            noise = SampleNoise(seed, iteration, range(share.start, share.stop))
            for point in points if settings.dropped else ():
                point.dropout = QDrop(settings.dropped, noise)
            args, kwargs = inputs.mixed(clean, chosen, settings.dropped, noise)
            with LayerOutputs.recorded(learned) as layer_outputs:
                outputs = LayerOutputs(main_tensor(module(*args, **kwargs)), layer_outputs)
            missed = error(outputs, targets.at(chosen), settings.block_weight, settings.layer_weight)
            missed = missed * (len(chosen) / len(minibatch))
        unit = ranks.all_reduce(missed.detach()).clamp(min=1e-12) if unit is None else unit
        loss = missed / unit
        if ranks.is_main:
            beta = annealed_beta(iteration / settings.iterations)
            for layer in coarse:
                loss = loss + settings.rounding_weight / weights * layer.weight_point.regularizer(beta)
        optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:
            loss.backward()
        ranks.all_reduce_gradients(parameter for group in groups for parameter in group["params"])
        optimizer.step()
        schedule.step()
        advance(1)
    for layer in coarse + moved:
        layer.weight_point.freeze(layer.weight)
    for point in points:
        point.freeze()
        point.dropout = None


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
