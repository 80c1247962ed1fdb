"""`minmax`: round to nearest, static ranges from the smallest and largest value. The baseline to beat."""

from __future__ import annotations

from typing import ClassVar

from stepquant.recipes.recipe import Recipe
from stepquant.recipes.stage import Stage
from stepquant.recipes.stages import AddQuantizers, CalibrateRanges, CollectSamples, Smooth


class MinMax(Recipe):
    """Round to nearest with static min-max ranges; nothing is learned.

    1. Collect samples at evenly spread steps of the full-precision sampler.
    2. Weights: per output channel, from min and max, rounded to nearest.
    3. Activations: one range per tensor for all steps, from min and max over the samples.
    """

    name: ClassVar[str] = "minmax"

    def stages(self) -> list[Stage]:
        return [
            CollectSamples(),  # 1
            AddQuantizers(weight_range="minmax"),  # 2
            Smooth(),
            CalibrateRanges(method="minmax"),  # 3
        ]
