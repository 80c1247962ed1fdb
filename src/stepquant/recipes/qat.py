"""`stepquant.train`: TDQ's quantization-aware training (So et al., NeurIPS 2023, arXiv 2306.02316).

Preset `fast` is our variant, for minutes: weights have a scale per output channel; grids are affine with the zero point
of the static range, which covers the paper's signed, unsigned and shifted grids alike; training starts at weights
rounded by GPTQ and ranges of least error; and generators are trained without dropout.

Preset `paper`: LSQ of weights with one symmetric scale per tensor, from ``2 mean |w| / sqrt(2^(b-1) - 1)`` and the
full-precision weights on; signed activation grids, from SiLU's smallest value behind it, that start at mean + 3 (16)
standard deviations; the interval itself generated, with the paper's features and dropout. ``weights="per-channel"`` is
the modern version. Learning rates and iterations are open in the paper, and those of `fast`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from stepquant.calibration.fake_quant.generator import Generation
from stepquant.calibration.fake_quant.weight_quantizers import PerChannelLSQ, PerTensorLSQ, RoundToNearest
from stepquant.optimize.reconstruction import GPTQ, LearnScales
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
    PRESETS: ClassVar = {"fast": {}, "paper": {"published": True, "weights": "per-tensor"}}

    distill: bool = False
    """Learn full precision's answers instead of the diffusion loss."""
    published: bool = False
    """Follow the paper: its grids, start and generator."""
    weights: Literal["per-channel", "per-tensor"] = "per-channel"
    """Scales of a weight, if `published`: one per output channel, or one for all."""
    zero_points: Literal["fixed", "generated"] = "fixed"
    """Zero points of activations: one for all timesteps, or generated like the intervals."""
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
        return [
            CollectSamples(),
            self._add_quantizers(),
            Smooth(),
            ReconstructBlocks(iterations=0, rounding=None if self.published else GPTQ(), scales=self._scales()),  # 1, 2
            Train(  # 3
                distill=self.distill,
                iterations=self.iterations,
                batch_size=self.batch_size,
                weight_rate=self.weight_rate,
                scale_rate=self.scale_rate,
                generator_rate=self.generator_rate,
                over_time=self.intervals == "generator",
                generation=self._generation(),
                from_codes=not self.published,
                ema_decay=self.ema_decay,
                refresh=self.refresh,
            ),
        ]

    @property
    def _signed(self) -> bool:
        return self.published and self.zero_points == "fixed"

    def _add_quantizers(self) -> AddQuantizers:
        published = PerTensorLSQ if self.weights == "per-tensor" else PerChannelLSQ
        return AddQuantizers(
            split_skips=not self.published,
            rows="one" if self.intervals == "static" else "training",
            rounding=published if self.published else RoundToNearest,
            activations="signed" if self._signed else "affine",
        )

    def _generation(self) -> Generation:
        return Generation(turns=None, published=self.published, zero_points=self.zero_points == "generated")

    def _scales(self) -> LearnScales:
        return LearnScales(
            method="deviations" if self._signed else "least-error",
            over_time="table" if self.intervals != "generator" else "generator",
            generation=self._generation() if self.published else Generation(zero_points=self.zero_points != "fixed"),
        )
