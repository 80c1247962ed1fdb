"""`tdq`: TDQ (So et al., NeurIPS 2023, arXiv 2306.02316): activation intervals as a function of the timestep.

The paper's post-training variant keeps the weights as they are; here they are rounded as in the other recipes, so that
these can be compared at equal effort. Open in the paper, and chosen here: 128 Fourier features; generators start at a
regression through the ranges found step by step and not at the static range, which a few hundred iterations would
hardly leave; weights have a scale per output channel, where the public code has one per tensor; grids are affine with
the zero point of the static range, where the paper's are symmetric, or behind a SiLU start at its smallest value.

What differs: the fastest Fourier feature turns four times over the table (`TURNS`), where the paper's turns every six
timesteps; generators are trained without dropout, which tens of iterations would only be disturbed by; and the free
table has, besides its own interval, its own zero point for each calibrated step, where a generator has one for all.

Missing in `paper`: all of the above but the generator, trained here for as long as the paper's; weights stay rounded to
nearest there.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from stepquant.optimize.reconstruction import LearnScales
from stepquant.recipes.recipe import BlockRecipe
from stepquant.recipes.stage import Stage
from stepquant.recipes.stages import AddQuantizers, CollectSamples, Smooth
from stepquant.settings import Weight


class TDQ(BlockRecipe):
    """A small network turns the timestep into each activation's interval; tabulated once it is trained.

    1. Collect samples of all steps (PTQ4DM's set).
    2. Every activation gets a generator that starts near the ranges of least error (section 3.3), and has a table row
       for every timestep of training.
    3. Train the generators through the quantizers' straight-through gradients, block by block, each after its weights
       are rounded. Tabulate them at every timestep of training and drop the networks: inference indexes a table once a
       step, with any sampler (section 3.4).
    """

    name: ClassVar[str] = "tdq"
    PRESETS: ClassVar = {"fast": {}, "paper": {"iterations": 5000, "batch_size": 32}}

    intervals: Literal["generator", "table", "static"] = "generator"
    """The paper's ablations: ``"table"``, an interval learned freely for each timestep; ``"static"``, none of it."""
    scale_rate: Weight = 1e-4
    """Learning rate of the generators, or of scales relative to their size."""

    def stages(self) -> list[Stage]:
        over_time: Literal["generator", "table"] = "generator" if self.intervals == "generator" else "table"
        return [
            CollectSamples(selection="normal"),  # 1
            AddQuantizers(split_skips=True, rows="one" if self.intervals == "static" else "training"),  # 2
            Smooth(),
            self.reconstruct(scales=LearnScales(rate=self.scale_rate, over_time=over_time)),  # 3
        ]
