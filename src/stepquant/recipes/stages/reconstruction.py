"""Reconstruction of blocks, and of the layers that depend on the timestep alone, as stages."""

from __future__ import annotations

from stepquant.optimize.blocks import reconstruct
from stepquant.optimize.reconstruction import AdaRound, Reconstruction
from stepquant.optimize.temporal import reconstruct_time_layers, temporal_block
from stepquant.recipes.context import Context
from stepquant.recipes.stage import LEARNING, Cost, Stage, State, Workload
from stepquant.settings import Iterations, Positive

PASSES = 4
"""Times that the samples pass the model: targets, inputs, ranges and the quantized outputs of each block."""

TIME_SHARE = 0.02
"""Of a pass through the denoiser, that its time layers take."""


class ReconstructBlocks(Reconstruction, Stage):
    """Round the weights and learn the activation scales block by block, each on what the quantized blocks before it
    put out; finished blocks are kept."""

    def cost(self, workload: Workload) -> Cost:
        samples = workload.calibration.samples
        batch = min(self.batch_size, samples)
        learning = f"{self.iterations} iterations each" if self.iterations else "nothing is learned"
        passes = PASSES * samples + LEARNING * self.iterations * batch
        return Cost(f"{workload.blocks} blocks, {learning}", passes, held=batch / workload.blocks)

    def run(self, context: Context, state: State) -> None:
        reconstruct(
            context.reference,
            state.model,
            context.description.blocks,
            state.samples,
            self,
            workspace=context.workspace,
            key=self.key(context, state),
            seed=context.seed,
            batch_size=context.chunk,
            progress=context.progress,
        )


class ReconstructTimeLayers(Stage):
    """Round the weights of all layers that depend on the timestep alone, together, over the finite set of timesteps
    (TFMQ-DM)."""

    rounding: AdaRound = AdaRound()
    iterations: Iterations = 500
    """Optimizer steps."""
    batch_size: Positive = 16
    """Timesteps per step."""

    def cost(self, workload: Workload) -> Cost:
        learning = TIME_SHARE * LEARNING * self.iterations * self.batch_size
        return Cost(f"time layers, {self.iterations} iterations", workload.calibration.steps + learning)

    def run(self, context: Context, state: State) -> None:
        names = context.description.time_layers_in(state.model.layers)
        if not names:
            return
        reconstruct_time_layers(
            temporal_block(context.reference, names, state.samples, context.chunk),
            state.model,
            self.rounding,
            self.iterations,
            self.batch_size,
            workspace=context.workspace,
            key=self.key(context, state),
            seed=context.seed,
            progress=context.progress,
        )
