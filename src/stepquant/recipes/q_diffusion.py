"""`q-diffusion`: Q-Diffusion (Li et al., ICCV 2023, arXiv 2302.04304), the usual baseline of the four papers.

What differs from the authors' public settings in `fast`, and why: they learn rounding (AdaRound) for 20,000 iterations
per block. In minutes on two cores that hardly differs from rounding to nearest, so weights are rounded in closed form
(GPTQ) and then learn through the rounding (``docs/results/defaults.md``). Scales learn relative to their size.

Missing in `paper`: weights are reconstructed before activations, each with its own iterations; 8-bit weights are
reconstructed too; the regularizer is weighted 0.01 in units of the error's own size.
"""

from __future__ import annotations

from typing import ClassVar

from stepquant.recipes.recipe import BlockRecipe
from stepquant.recipes.stage import Stage
from stepquant.recipes.stages import AddQuantizers, CollectSamples, Smooth


class QDiffusion(BlockRecipe):
    """Uniform timesteps, split skip connections, block reconstruction.

    1. Collect samples at evenly spread timesteps: neighbouring steps are alike, all of them matter (section 4.1).
    2. Split the layers behind skip concatenations: trunk and skip have different ranges (section 4.2).
    3. Weights: per output channel, the range of least ``|w - w'|^2.4``; then, block by block on the quantized
       network's inputs: activation ranges likewise, weights rounded, weights and activation scales learned
       (sections 3 and 4.3).
    """

    name: ClassVar[str] = "q-diffusion"
    PRESETS: ClassVar = {
        "fast": {},
        "paper": {
            "iterations": 20_000,
            "batch_size": 32,
            "rounding": "adaround",
            "rounding_rate": 1e-3,
        },
    }

    def stages(self) -> list[Stage]:
        return [
            CollectSamples(),  # 1
            AddQuantizers(split_skips=True),  # 2
            Smooth(),
            self.reconstruct(),  # 3
        ]
