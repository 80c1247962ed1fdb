"""`tfmq`: TFMQ-DM (Huang et al., CVPR 2024, arXiv 2311.16503): the layers that know the time, kept faithful first.

What differs: the time layers have one static activation range each, as all layers have, where the paper calibrates one
for each of the finitely many timesteps; their block comes last and not first (see 3 below).

Missing in `paper`: besides these, 8-bit weights are not reconstructed.
"""

from __future__ import annotations

from typing import ClassVar

from stepquant.recipes.recipe import BlockRecipe
from stepquant.recipes.stage import Stage
from stepquant.recipes.stages import AddQuantizers, CollectSamples, Finetune, Smooth
from stepquant.settings import Iterations, Weight


class TFMQ(BlockRecipe):
    """Reconstruct what depends on the timestep alone, over the finite set of timesteps; then block by block.

    1. Collect samples at evenly spread steps; the time layers see no other inputs than those steps'.
    2. Blocks as in `q-diffusion`.
    3. Temporal information block (section 4.1): time embedding and every projection of it, together, against their
       outputs in full precision. It comes last here, because the blocks hold the projections and would undo it.
    """

    name: ClassVar[str] = "tfmq"
    PRESETS: ClassVar = {
        "fast": {},
        "paper": {
            "iterations": 20_000,
            "time_iterations": 20_000,
            "batch_size": 32,
            "rounding": "adaround",
            "rounding_rate": 1e-3,
        },
    }

    time_iterations: Iterations = 150
    """Optimizer steps of the temporal information block."""
    weight_rate: Weight = 1e-3
    """Learning rate of its weights, in steps of their grid."""

    def stages(self) -> list[Stage]:
        return [
            CollectSamples(),  # 1
            AddQuantizers(split_skips=True),
            Smooth(),
            self.reconstruct(),  # 2
            Finetune(
                name="Temporal information block",  # 3
                layers=("time",),
                all_scales=False,
                iterations=self.time_iterations,
                batch_size=self.batch_size,
                weight_rate=self.weight_rate,
                scale_rate=self.scale_rate,
                global_weight=0.0,
            ),
        ]
