"""`ptq4dm`: PTQ4DM (Shang et al., CVPR 2023, arXiv 2211.15736): where the calibration samples come from.

Preset `paper` has the published number of samples, each from another image, and ranges of least error for 8-bit
weights, too, where `fast` takes their smallest and largest value. All other hyperparameters are the published ones.
"""

from __future__ import annotations

from typing import ClassVar

from stepquant.calibration.fake_quant.weight_quantizers import LeastError, RoundToNearest
from stepquant.calibration.samples import Calibration
from stepquant.recipes.recipe import Recipe
from stepquant.recipes.stage import Stage
from stepquant.recipes.stages import AddQuantizers, CalibrateRanges, CollectSamples, Smooth
from stepquant.settings import Weight


class PTQ4DM(Recipe):
    """Normally distributed timesteps, ranges of least error; nothing is learned.

    1. Collect samples of the denoising process at timesteps ``t ~ N(mean T, (deviation T)^2)`` (section 3.3); the
       defaults are those of the authors' public code.
    2. Weights: per output channel, the range of least ``|w - w'|^2.4``, rounded to nearest.
    3. Activations: one such range per tensor, for all steps.

    """

    name: ClassVar[str] = "ptq4dm"
    PRESETS: ClassVar = {"fast": {}, "paper": {"published": True}}
    PUBLISHED: ClassVar = Calibration(samples=1024, steps=100, trajectories=1024)

    mean: Weight = 0.5
    """Mean timestep, as a share of T."""
    deviation: Weight = 0.35
    """Standard deviation of timesteps, as a share of T."""
    published: bool = False
    """Round 8-bit weights, too, in the range of least error."""

    def stages(self) -> list[Stage]:
        return [
            CollectSamples(selection="normal", mean=self.mean, deviation=self.deviation),  # 1
            AddQuantizers(rounding=LeastError if self.published else RoundToNearest),  # 2
            Smooth(),
            CalibrateRanges(),  # 3
        ]
