"""`pqd`: PQD (arXiv 2501.00124, WACV workshop 2025). No public code; what the text leaves open is chosen here:

- mean and deviation of the timesteps: 0.4 and 0.4 of T, a little nearer the image than PTQ4DM's.
- "time-aware" ranges: every sample enters the search with equally many values, so a timestep weighs by its share of
  the samples.
- skip connections are split, as in `q-diffusion`, so that the two recipes differ in their samples alone.

Preset `fast` is our variant: weights below 8 bits are rounded in closed form (GPTQ), then weights and scales learn for
a budget that two cores finish in minutes, without QDrop, since GPTQ's weights fit the quantized inputs that it would
take from them (``docs/results/defaults.md``).

Preset `paper`: 1,024 samples, each from another image, and QDrop as its public code has it: AdaRound of all weights,
8-bit ones included, with the activation scales, dropping 0.5; learning rates 1e-3 (constant) and 4e-5 (cosine).
"""

from __future__ import annotations

from typing import ClassVar

from stepquant.calibration.samples import Calibration
from stepquant.recipes.recipe import BlockRecipe
from stepquant.recipes.stage import Stage
from stepquant.recipes.stages import AddQuantizers, CollectSamples, Smooth
from stepquant.settings import Share, Weight


class PQD(BlockRecipe):
    """Normally distributed timesteps with the model's conditions, then QDrop reconstruction block by block.

    1. Collect samples of the denoising process, with the prompts or classes the model will see and, under guidance,
       with the empty condition as well, at timesteps ``t ~ N(mean T, (deviation T)^2)``.
    2. Activation ranges of least error over the samples, weighted by their timesteps' share; weights rounded, then
       weights and activation scales learned together, each block on the quantized network's inputs.
    3. VAE and text encoder of a latent model stay as they are.
    """

    name: ClassVar[str] = "pqd"
    PRESETS: ClassVar = {
        "fast": {},
        "paper": {
            "published": True,
            "iterations": 20_000,
            "batch_size": 32,
            "rounding": "adaround",
            "rounding_rate": 1e-3,
            "rounding_weight": 0.01,
            "scale_rate": 4e-5,
            "drop_probability": 0.5,
        },
    }
    PUBLISHED: ClassVar = Calibration(samples=1024, steps=100, trajectories=1024)

    mean: Weight = 0.4
    """Mean timestep, as a share of T."""
    deviation: Weight = 0.4
    """Standard deviation of timesteps, as a share of T."""
    drop_probability: Share | None = None
    """QDrop's probability that an element stays in full precision; None: 0.5 under AdaRound, else 0."""

    def stages(self) -> list[Stage]:
        return [
            CollectSamples(selection="normal", mean=self.mean, deviation=self.deviation),  # 1
            AddQuantizers(split_skips=True, rounding=self.weights),
            Smooth(),
            self.reconstruct(drop_probability=self.drop_probability),  # 2
        ]
