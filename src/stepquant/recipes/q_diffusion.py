"""`q-diffusion`: Q-Diffusion (Li et al., ICCV 2023, arXiv 2302.04304), the usual baseline of the four papers.

Preset `fast` is our variant. The authors learn rounding (AdaRound) for 20,000 iterations per block. In minutes on two
cores that hardly differs from rounding to nearest, so weights are rounded in closed form (GPTQ) and then learn through
the rounding, together with the scales (``docs/results/defaults.md``). Scales learn relative to their size.

Preset `paper` follows the public code: first the weights, 8-bit ones included, with activations in full precision,
20,000 iterations of AdaRound at a constant 1e-3; then the activation scales, 5,000 iterations at 4e-4 on
``|B_q - B_fp|^2.4``. Against that code, 8-bit weights have symmetric grids, which integer kernels need; first and last
layer have 8 bits (``first_last_bits``); the regularizer covers both sides of a split weight, of which the code skips
one; and blocks are reconstructed in the order in which they execute.
"""

from __future__ import annotations

from typing import ClassVar

from stepquant.calibration.samples import Calibration
from stepquant.optimize.reconstruction import LearnScales
from stepquant.recipes.recipe import BlockRecipe
from stepquant.recipes.stage import Stage
from stepquant.recipes.stages import AddQuantizers, CollectSamples, ReconstructBlocks, Smooth
from stepquant.settings import Iterations


class QDiffusion(BlockRecipe):
    """Uniform timesteps, split skip connections, block reconstruction.

    1. Collect samples at evenly spread timesteps: neighbouring steps are alike, all of them matter (section 4.1).
    2. Split the layers behind skip concatenations: trunk and skip have different ranges (section 4.2). Weights: per
       output channel, the range of least ``|w - w'|^2.4``.
    3. Block by block on the quantized network's inputs: weights rounded (sections 3 and 4.3).
    4. Activation ranges likewise, and their scales learned; in `fast` together with the weights, block by block.
    """

    name: ClassVar[str] = "q-diffusion"
    PRESETS: ClassVar = {
        "fast": {},
        "paper": {
            "published": True,
            "iterations": 20_000,
            "batch_size": 32,
            "rounding": "adaround",
            "rounding_rate": 1e-3,
            "rounding_weight": 0.01,
            "scale_rate": 4e-4,
        },
    }
    PUBLISHED: ClassVar = Calibration(samples=1024, steps=100, trajectories=1024)

    scale_iterations: Iterations = 5000
    """Optimizer steps per block of the activation scales, if `published`."""

    def stages(self) -> list[Stage]:
        return [
            CollectSamples(),  # 1
            AddQuantizers(split_skips=True, rounding=self.weights),  # 2
            Smooth(),
            *(self._published() if self.published else [self.reconstruct()]),  # 3, 4
        ]

    def _published(self) -> list[ReconstructBlocks]:
        learned = LearnScales(rate=self.scale_rate, relative=False)
        return [
            self.reconstruct(scales=None, drop_probability=0.0),  # 3
            self.reconstruct(rounding=None, scales=learned, power=2.4, iterations=self.scale_iterations),  # 4
        ]
