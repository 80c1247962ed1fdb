"""`pqd`: PQD (arXiv 2501.00124, WACV workshop 2025). No public code; what the text leaves open is chosen here:

- mean and deviation of the timesteps: 0.4 and 0.4 of T, a little nearer the image than PTQ4DM's.
- "time-aware" ranges: every sample enters the search with equally many values, so a timestep weighs by its share of
  the samples.
- QDrop: with ``rounding="adaround"`` elements stay in full precision with probability 0.5 while learning. GPTQ's
  weights fit the quantized inputs that this would take from them (``docs/results/defaults.md``): nothing is dropped
  then, unless `drop_probability` is set.
- iterations: in `fast` a budget that two cores finish in minutes; in `paper` those of QDrop. Skip connections are
  split, as in `q-diffusion`, so that the two recipes differ in their samples alone.

Missing in `paper`: 1,024 samples are up to the calibration, and 8-bit weights are not reconstructed.
"""

from __future__ import annotations

from typing import ClassVar

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
            "iterations": 20_000,
            "batch_size": 32,
            "rounding": "adaround",
            "rounding_rate": 1e-3,
            "drop_probability": 0.5,
        },
    }

    mean: Weight = 0.4
    """Mean timestep, as a share of T."""
    deviation: Weight = 0.4
    """Standard deviation of timesteps, as a share of T."""
    drop_probability: Share | None = None
    """QDrop's probability that an element stays in full precision; None: 0.5 under AdaRound, else 0."""

    def stages(self) -> list[Stage]:
        return [
            CollectSamples(selection="normal", mean=self.mean, deviation=self.deviation),  # 1
            AddQuantizers(split_skips=True),
            Smooth(),
            self.reconstruct(drop_probability=self.drop_probability),  # 2
        ]
