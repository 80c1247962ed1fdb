"""Block reconstruction: learn rounding and activation scales so that each block puts out what it should."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stepquant.calibration.fake_quant.layers import TrainableLayer
from stepquant.calibration.instrument import Instrumented, search_ranges
from stepquant.calibration.placement import staying
from stepquant.calibration.samples import CalibrationSet
from stepquant.core.noise import SampleNoise
from stepquant.core.ranges import RangeMethod
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
    activation_range: RangeMethod = "least-error"
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
    instrumented: Instrumented,
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
        instrumented: the copy to learn on; afterwards its quantizers are settled.
        key: stands for everything that the result depends on besides `settings` and `seed`.
        batch_size: samples passed through the networks at a time.
    """
    key = digest([key, asdict(settings), seed, list(blocks)])[:16]
    ranks = workspace.ranks
    original = Replay(full_precision, samples, batch_size, workspace.scratch("full-precision"), ranks=ranks)
    scratch = workspace.scratch("quantized")
    quantized = Replay(instrumented.model, samples, batch_size, scratch, instrumented.clock, ranks)
    timesteps = samples.tensors["timestep"]
    with progress.task("Reconstructing blocks", len(blocks) * settings.iterations) as advance:
        for index, block in enumerate(blocks):
            pair = full_precision.get_submodule(block), instrumented.model.get_submodule(block)
            clean = original.inputs(block)
            inputs = quantized.inputs(block)
            layers = list(instrumented.layers_in(block)) if settings.layer_weight else []
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
                            _initialise_ranges(instrumented, block, inputs, settings, samples, batch_size, ranks)
                        if settings.rounding == "gptq":
                            coarse = _coarse_layers(instrumented, block)
                            passed = (samples, batch_size, ranks)
                            gptq(full_precision, instrumented, block, coarse, clean, inputs, *passed)
                        targets = LayerOutputs(target, layer_targets)
                        _learn(instrumented, block, inputs, clean, targets, timesteps, settings, start, ranks, advance)
                    workspace.save(stage, _block_state(instrumented, block))
                else:
                    _restore(instrumented, block, stored, settings)
                    advance(settings.iterations)
                quantized.run(block, inputs)


def _coarse_layers(instrumented: Instrumented, block: str) -> dict[str, TrainableLayer]:
    """The layers of a block whose rounding is worth more than rounding to nearest."""
    layers = instrumented.layers_in(block).items()
    return {name: layer for name, layer in layers if layer.weight_quantizer.bits < LEARN_ROUNDING_BELOW}


def _initialise_ranges(
    instrumented: Instrumented,
    block: str,
    inputs: BlockInputs,
    settings: Settings,
    samples: CalibrationSet,
    batch_size: int,
    ranks: Ranks,
) -> None:
    """Find the ranges of the block's activations on what really reaches them."""
    quantizers = list(instrumented.activation_quantizers(block))
    for quantizer in quantizers:
        quantizer.observing = True
    with torch.no_grad():
        batches = list(samples.batches(batch_size))
        for chosen in batches[ranks.share(len(batches))]:
            args, kwargs = inputs.at(chosen)
            instrumented.clock.set(samples.tensors["timestep"][chosen])
            instrumented.model.get_submodule(block)(*args, **kwargs)
    per_row, neighbours = settings.over_time == "table", settings.neighbours
    search_ranges(quantizers, settings.activation_range, per_row=per_row, ranks=ranks, neighbours=neighbours)
    for quantizer in quantizers:
        # Before the weights are rounded: they are gptq-rounded for the intervals that they will meet.
        quantizer.learn(over_time=settings.over_time == "generator")


def _learn(
    instrumented: Instrumented,
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
    module = instrumented.model.get_submodule(block)
    quantizers = list(instrumented.activation_quantizers(block)) if settings.learn_scales else []
    moved: list[TrainableLayer] = []
    coarse = list(_coarse_layers(instrumented, block).values()) if settings.rounding == "adaround" else []
    roundings = [layer.weight_quantizer.learn(layer.weight) for layer in coarse]
    weights = max(1, sum(rounding.numel() for rounding in roundings))
    groups: list[dict[str, Any]] = []
    if roundings:
        groups.append({"params": roundings, "lr": settings.rounding_rate})
    if settings.rounding == "gptq" and settings.weight_rate > 0:
        moved = list(_coarse_layers(instrumented, block).values())
        shifts = [layer.weight_quantizer.finetune(layer.weight, HOLD) for layer in moved]
        groups += [{"params": shifts, "lr": settings.weight_rate}] if shifts else []
    if quantizers:
        gains = [parameter for quantizer in quantizers for parameter in quantizer.learned()]
        groups.append({"params": gains, "lr": settings.scale_rate})
    for quantizer in quantizers:
        quantizer.drop_probability = settings.dropped
    if not groups:
        advance(settings.iterations)
        return
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, settings.iterations))
    generator = torch.Generator().manual_seed(seed)
    unit: Tensor | None = None
    learned = {name: instrumented.layers[name] for name in targets.layers}
    for iteration in range(settings.iterations):
        minibatch = torch.randint(inputs.samples, (min(settings.batch_size, inputs.samples),), generator=generator)
        share = ranks.share(len(minibatch))
        chosen = minibatch[share]
        missed = torch.zeros(())
        if len(chosen):
            instrumented.clock.set(timesteps[chosen])
            noise = SampleNoise(seed, iteration, range(share.start, share.stop))
            for quantizer in quantizers:
                quantizer.noise = noise
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
                loss = loss + settings.rounding_weight / weights * layer.weight_quantizer.regularizer(beta)
        optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:
            loss.backward()
        ranks.all_reduce_gradients(parameter for group in groups for parameter in group["params"])
        optimizer.step()
        schedule.step()
        advance(1)
    for layer in coarse + moved:
        layer.weight_quantizer.settle(layer.weight)
    for quantizer in quantizers:
        quantizer.settle()
        quantizer.drop_probability, quantizer.noise = 0.0, None


def _block_state(instrumented: Instrumented, block: str) -> dict[str, Tensor]:
    """What was learned in one block, by name."""
    state: dict[str, Tensor] = {}
    for name, layer in instrumented.layers_in(block).items():
        state[f"{name}.codes"] = layer.weight_quantizer.codes(layer.weight)
    for index, quantizer in enumerate(instrumented.activation_quantizers(block)):
        state[f"{index}.scale"], state[f"{index}.zero_point"] = quantizer.scale, quantizer.zero_point
    return state


def _restore(instrumented: Instrumented, block: str, state: dict[str, Tensor], settings: Settings) -> None:
    for name, layer in instrumented.layers_in(block).items():
        layer.weight_quantizer.decided = state[f"{name}.codes"]
    for index, quantizer in enumerate(instrumented.activation_quantizers(block)):
        quantizer.scale, quantizer.zero_point = state[f"{index}.scale"], state[f"{index}.zero_point"]
        quantizer.enabled = settings.learn_scales
