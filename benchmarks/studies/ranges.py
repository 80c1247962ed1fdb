"""Block reconstruction with activation ranges found another way, for `ranges.toml`."""

from __future__ import annotations

from stepquant.core.ranges import Range
from stepquant.optimize.reconstruction import LearnScales
from stepquant.recipes import Recipe, Stage
from stepquant.recipes.stages import AddQuantizers, CollectSamples, ReconstructBlocks
from stepquant.settings import Iterations


class Reconstructed(Recipe):
    """`q-diffusion`, its activation ranges found by `activation_range`."""

    activation_range: Range = "least-error"
    iterations: Iterations = 50

    def stages(self) -> list[Stage]:
        scales = LearnScales(method=self.activation_range)
        return [
            CollectSamples(),
            AddQuantizers(split_skips=True),
            ReconstructBlocks(iterations=self.iterations, scales=scales),
        ]
