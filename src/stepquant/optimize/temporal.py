"""Reconstruct what depends on the timestep alone, over the finite set of timesteps (TFMQ-DM, arXiv 2311.16503).

The layers form one block: each reads the timestep's features, or what an earlier layer makes of them, through SiLU or
not. Which one it is follows from the values in one call of the full-precision denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.samples import CalibrationSet
from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.files import digest
from stepquant.optimize.objectives import squared_error
from stepquant.optimize.reconstruction import AdaRound
from stepquant.optimize.trainer import constant, cosine, optimize
from stepquant.progress import Progress
from stepquant.workspace import Workspace


class TimeLayer(NamedTuple):
    """A layer of the temporal block, on T timesteps.

    Attributes:
        input, output: in full precision: float [T, ...].
        source: the earlier layer whose output it reads; None: `input` depends on no other layer.
        silu: whether it reads that output through SiLU.
    """

    input: Tensor
    output: Tensor
    source: str | None
    silu: bool


class TemporalBlock:
    """The layers in the order in which they execute, and the finite set of timesteps, float [T]."""

    def __init__(self, layers: dict[str, TimeLayer], timesteps: Tensor) -> None:
        self.layers, self.timesteps = layers, timesteps

    def run(self, calibrated: CalibrationModel, chosen: Tensor) -> dict[str, Tensor]:
        """Outputs of the layers under calibration at some of the timesteps."""
        calibrated.clock.set(self.timesteps[chosen])
        outputs: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            given = layer.input[chosen] if layer.source is None else outputs[layer.source]
            outputs[name] = calibrated.layers[name](F.silu(given) if layer.silu else given)
        return outputs

    def error(self, calibrated: CalibrationModel, chosen: Tensor) -> Tensor:
        """``sum over layers of |O_l - O~_l|^2``, summed over channels, averaged over timesteps."""
        outputs = self.run(calibrated, chosen)
        return torch.stack(
            [squared_error(outputs[name], layer.output[chosen]) for name, layer in self.layers.items()]
        ).sum()


@torch.no_grad()
def temporal_block(
    denoiser: nn.Module, names: Sequence[str], samples: CalibrationSet, batch_size: int
) -> TemporalBlock:
    """Run the denoiser once at every calibrated timestep, and find what each of the layers called `names` reads.

    Raises:
        StepquantError: if a layer is not called with a row for each sample.
    """
    timesteps = samples.timesteps
    values, owner = timesteps.unique(return_inverse=True)
    first = torch.stack([(owner == row).nonzero()[0, 0] for row in range(len(values))])
    seen: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    finished: list[Tensor] = []  # batches

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # The first call of a pass: DiT's last layer calls the embedding of its first block again.
            seen.setdefault(name, {}).setdefault(len(finished), (inputs[0].detach().clone(), output.detach().clone()))

        return hook

    handles = [denoiser.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        for chosen in samples.ranges.split(first, batch_size):
            denoiser(**samples.arguments(chosen))
            finished.append(chosen)
    finally:
        for handle in handles:
            handle.remove()
    layers: dict[str, TimeLayer] = {}
    for name, calls in seen.items():
        given, output = (torch.cat(parts) for parts in zip(*calls.values(), strict=True))
        if len(given) != len(first):
            raise StepquantError(
                f"time layer {name} is called with {len(given)} rows for {len(first)} timesteps; expected one each. "
                "Use the preset fast, or another recipe."
            )
        layers[name] = TimeLayer(given, output, *_source(given, layers))
    return TemporalBlock(layers, timesteps[torch.cat(finished)])


def _source(given: Tensor, layers: dict[str, TimeLayer]) -> tuple[str | None, bool]:
    for name, layer in reversed(layers.items()):
        if layer.output.shape == given.shape:
            for silu in (True, False):
                if torch.allclose(F.silu(layer.output) if silu else layer.output, given, rtol=1e-4, atol=1e-6):
                    return name, silu
    return None, False


def reconstruct_time_layers(
    block: TemporalBlock,
    calibrated: CalibrationModel,
    rounding: AdaRound,
    iterations: int,
    batch_size: int,
    *,
    workspace: Workspace,
    key: str,
    seed: int,
    progress: Progress,
) -> None:
    """Round the weights by AdaRound, together.

    Args:
        block: its layers are under calibration in `calibrated`, and frozen afterwards.
        key: stands for everything that the result depends on besides `seed`.
    """
    layers = {name: calibrated.layers[name] for name in block.layers}
    stage = f"time-{digest([key, seed])[:16]}"
    stored = workspace.load(stage)
    if stored is None:
        with progress.task("Reconstructing time layers", iterations) as advance:
            _round(block, calibrated, rounding, iterations, batch_size, seed, workspace.ranks, advance)
        workspace.save(stage, {name: layer.weight_point.codes(layer.weight) for name, layer in layers.items()})
        return
    for name, layer in layers.items():
        layer.weight_point.set_codes(stored[name])


def _round(
    block: TemporalBlock,
    calibrated: CalibrationModel,
    rounding: AdaRound,
    iterations: int,
    batch_size: int,
    seed: int,
    ranks: Ranks,
    advance: Callable[[int], None],
) -> None:
    layers = [layer for layer in map(calibrated.layers.get, block.layers) if layer is not None]
    learned = [layer for layer in layers if layer.weight_point.bits < rounding.below]
    variables = [layer.weight_point.adaround(layer.weight) for layer in learned]
    generator = torch.Generator().manual_seed(seed)
    count = min(batch_size, len(block.timesteps))

    def loss(iteration: int) -> Tensor:
        chosen = torch.randperm(len(block.timesteps), generator=generator)[:count]
        whole = block.error(calibrated, chosen) / ranks.count  # every process has all timesteps
        factor, beta = rounding.weight_and_beta(iteration / iterations, sum(v.numel() for v in variables))
        for layer in learned if factor else ():
            whole = whole + factor / ranks.count * layer.weight_point.regularizer(beta)
        return whole

    groups = [{"params": variables, "lr": rounding.rate}] if variables else []
    schedule = cosine if rounding.decay else constant
    optimize(groups, loss, iterations, ranks=ranks, advance=advance, schedule=schedule, fused=False)
    for layer in learned:
        layer.weight_point.freeze(layer.weight)
