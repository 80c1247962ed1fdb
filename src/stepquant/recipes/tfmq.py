"""`tfmq`: TFMQ-DM (Huang et al., CVPR 2024, arXiv 2311.16503): the layers that know the time, kept faithful.

Preset `fast` is our variant: blocks as in `q-diffusion`, and then the temporal block, through the network, because the
blocks hold the projections of time and would undo it; its layers have one static activation range each.

Preset `paper`: first the temporal block, by AdaRound, over the finite set of calibrated timesteps; then the weights of
all blocks, whose time layers stay as they are; then ranges of least error, static but for the time layers, which have
one for each timestep; no scale is learned. Against the public code, which leaves shortcuts, downsampling convolutions,
the first time layer and both ends in full precision and attention products unquantized, all of these are quantized. An
embedding that a condition is added to counts as given, not as computed by the temporal block.
"""

from __future__ import annotations

from typing import ClassVar

from stepquant.calibration.samples import Calibration
from stepquant.recipes.recipe import BlockRecipe, published_adaround
from stepquant.recipes.stage import Stage
from stepquant.recipes.stages import (
    AddQuantizers,
    CalibrateRanges,
    CollectSamples,
    Finetune,
    ReconstructTimeLayers,
    Smooth,
)
from stepquant.settings import Iterations, Weight


class TFMQ(BlockRecipe):
    """Reconstruct what depends on the timestep alone, over the finite set of timesteps, and the blocks.

    1. Collect samples at evenly spread steps; the time layers see no other inputs than those steps'.
    2. Temporal information block (section 4.1): time embedding and every projection of it, together, against their
       outputs in full precision. In `fast` it comes last.
    3. Blocks as in `q-diffusion`; in `paper` without the layers of step 2.
    4. Finite set calibration (section 4.2): an activation range for each timestep in the time layers; `paper` only.
    """

    name: ClassVar[str] = "tfmq"
    PRESETS: ClassVar = {
        "fast": {},
        "paper": {
            "published": True,
            "iterations": 20_000,
            "time_iterations": 20_000,
            "batch_size": 32,
            "rounding": "adaround",
            "rounding_rate": 1e-3,
            "rounding_weight": 0.01,
        },
    }
    PUBLISHED: ClassVar = Calibration(samples=1024, steps=100, trajectories=1024)

    time_iterations: Iterations = 150
    """Optimizer steps of the temporal information block."""
    weight_rate: Weight = 1e-3
    """Learning rate of its weights, in steps of their grid, unless `published`."""

    def stages(self) -> list[Stage]:
        return [CollectSamples(), *(self._published() if self.published else self._fast())]  # 1

    def _published(self) -> list[Stage]:
        return [
            AddQuantizers(split_skips=True, rows="calibrated", rows_of="time", rounding=self.weights),
            Smooth(),
            ReconstructTimeLayers(  # 2
                rounding=published_adaround(self.rounding_rate, self.rounding_weight),
                iterations=self.time_iterations,
                batch_size=self.batch_size,
            ),
            self.reconstruct(scales=None, drop_probability=0.0, time_layers=False),  # 3
            CalibrateRanges(quantized_weights=True),  # 4
        ]

    def _fast(self) -> list[Stage]:
        return [
            AddQuantizers(split_skips=True),
            Smooth(),
            self.reconstruct(),  # 3
            Finetune(
                name="Temporal information block",  # 2
                layers=("time",),
                all_scales=False,
                iterations=self.time_iterations,
                batch_size=self.batch_size,
                weight_rate=self.weight_rate,
                scale_rate=self.scale_rate,
                global_weight=0.0,
            ),
        ]
