"""`tdq`: TDQ (So et al., NeurIPS 2023, arXiv 2306.02316): activation intervals as a function of the timestep.

Preset `fast` is our variant, comparable with the other recipes at equal effort: weights are rounded as there (GPTQ) and
learn with the generators; skip connections are split; grids are affine; generators put out a gain on the static
interval, and start at a regression through the ranges found step by step and not at the static range, which a few
hundred iterations would hardly leave. The fastest Fourier feature turns four times over the table (`TURNS`), where the
paper's turns every six timesteps: a network trained on the 20 or 50 timesteps of a sampler cannot learn to ignore that.
There is no dropout, which tens of iterations would only be disturbed by.

Preset `paper` is the post-training algorithm: weights stay as they are rounded to nearest; grids are signed and
symmetric, or behind SiLU start at its smallest value -0.2785; the interval itself is generated, from the paper's
features, by four layers of 64 with dropout 0.2 before the last, and starts at mean + 3 standard deviations of the
activation (16 behind SiLU). Open in the paper, and chosen here: 128 Fourier features, 5,000 iterations of 32 at 1e-3,
and the block's error as the loss. Where integers force a choice: symmetric grids use the code -n/2, too; the offset
behind SiLU is the nearest multiple of the interval, at each timestep; weights have a scale per output channel.

A zero point is fixed over time in the paper, and in `fast`. With ``zero_points="generated"`` the network has a second
output for it: grids are then affine, and start at the range of least error.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from stepquant.calibration.fake_quant.generator import TURNS, Generation
from stepquant.calibration.fake_quant.observer import ActivationRange
from stepquant.calibration.samples import Calibration
from stepquant.optimize.reconstruction import LearnScales
from stepquant.recipes.recipe import BlockRecipe
from stepquant.recipes.stage import Stage
from stepquant.recipes.stages import AddQuantizers, CollectSamples, ReconstructBlocks, Smooth
from stepquant.settings import Weight


class TDQ(BlockRecipe):
    """A small network turns the timestep into each activation's interval; tabulated once it is trained.

    1. Collect samples of all steps (PTQ4DM's set).
    2. Every activation gets a generator (section 3.3), and has a table row for every timestep of training.
    3. Train the generators through the quantizers' straight-through gradients, block by block; in `fast` each after its
       weights are rounded. Tabulate them at every timestep of training and drop the networks: inference indexes a table
       once a step, with any sampler (section 3.4).
    """

    name: ClassVar[str] = "tdq"
    PRESETS: ClassVar = {
        "fast": {},
        "paper": {"published": True, "iterations": 5000, "batch_size": 32, "scale_rate": 1e-3},
    }
    PUBLISHED: ClassVar = Calibration(samples=1024, steps=100, trajectories=1024)

    intervals: Literal["generator", "table", "static"] = "generator"
    """The paper's ablations: ``"table"``, an interval learned freely for each timestep; ``"static"``, none of it."""
    zero_points: Literal["fixed", "generated"] = "fixed"
    """Zero points: one for all timesteps, or generated like the intervals."""
    scale_rate: Weight = 1e-4
    """Learning rate of the generators, or of scales relative to their size."""

    def stages(self) -> list[Stage]:
        rows: Literal["one", "training"] = "one" if self.intervals == "static" else "training"
        signed = self.published and self.zero_points == "fixed"
        return [
            CollectSamples(selection="normal"),  # 1
            AddQuantizers(split_skips=not self.published, rows=rows, activations="signed" if signed else "affine"),  # 2
            Smooth(),
            self._train(),  # 3
        ]

    def _train(self) -> ReconstructBlocks:
        fixed = self.zero_points == "fixed"
        method: ActivationRange = "deviations" if self.published and fixed else "least-error"
        generation = Generation(
            turns=None if self.published else TURNS, published=self.published, zero_points=not fixed
        )
        scales = LearnScales(
            method=method,
            rate=self.scale_rate,
            over_time="generator" if self.intervals == "generator" else "table",
            generation=generation,
        )
        return self.reconstruct(scales=scales, **({"rounding": None} if self.published else {}))
