"""Block reconstruction as a stage."""

from __future__ import annotations

from stepquant.optimize.blocks import reconstruct
from stepquant.optimize.reconstruction import Reconstruction
from stepquant.recipes.context import Context
from stepquant.recipes.stage import LEARNING, Cost, Stage, State, Workload

PASSES = 4
"""Times that the samples pass the model: targets, inputs, ranges and the quantized outputs of each block."""


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
