"""`stepquant.train`: TDQ's quantization-aware training (So et al., NeurIPS 2023, arXiv 2306.02316).

Against the paper: weights have a scale per output channel, where the public code has one per tensor; grids are affine
with the zero point of the static range, which covers the paper's signed, unsigned and shifted grids alike; training
starts at weights rounded by GPTQ and ranges of least error, since minutes and not days follow, and for the same reason
generators are trained without dropout.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from stepquant.optimize.reconstruction import LearnScales
from stepquant.recipes.recipe import Recipe
from stepquant.recipes.stage import Stage
from stepquant.recipes.stages import AddQuantizers, CollectSamples, ReconstructBlocks, Smooth, Train
from stepquant.settings import Count, Iterations, Positive, Weight


class QAT(Recipe):
    """Weights, their scales and the activations' intervals trained together, from the pretrained model.

    1. Start after training: ranges of least error, weights rounded by GPTQ, on the sampler's inputs.
    2. Every activation gets a generator that turns the timestep into its interval (section 3.3).
    3. Train on the diffusion loss over images, or by distillation from full precision: on the same noised images, or
       without any on trajectories of the sampler with half to twice the calibration's steps. Tabulate the generators at
       every timestep of training and drop the networks (section 3.4).
    """

    name: ClassVar[str] = "qat"

    distill: bool = False
    """Learn full precision's answers instead of the diffusion loss."""
    intervals: Literal["generator", "static", "table"] = "generator"
    """How activation scales depend on the timestep; the ablations: ``"static"`` is LSQ, ``"table"`` learns each
    timestep's interval on its own."""
    iterations: Iterations = 2000
    """Optimizer steps."""
    batch_size: Positive = 16
    """Images, or points of trajectories, per step."""
    weight_rate: Weight = 1e-3
    """Learning rate of weights, relative to the size of each tensor."""
    scale_rate: Weight = 1e-3
    """Learning rate of scales, relative to their size."""
    generator_rate: Weight = 1e-3
    """Learning rate of the networks that generate intervals."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of the moving average that ships; 0 for none."""
    refresh: Count = 500
    """Iterations after which other trajectories are generated; 0 keeps the first."""

    def stages(self) -> list[Stage]:
        over_time: Literal["generator", "table"] = "generator" if self.intervals == "generator" else "table"
        return [
            CollectSamples(),
            AddQuantizers(split_skips=True, rows="one" if self.intervals == "static" else "training"),
            Smooth(),
            ReconstructBlocks(iterations=0, scales=LearnScales(over_time=over_time)),  # 1, 2
            Train(  # 3
                distill=self.distill,
                iterations=self.iterations,
                batch_size=self.batch_size,
                weight_rate=self.weight_rate,
                scale_rate=self.scale_rate,
                generator_rate=self.generator_rate,
                over_time=over_time == "generator",
                ema_decay=self.ema_decay,
                refresh=self.refresh,
            ),
        ]
