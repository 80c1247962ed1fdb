"""`quest`: QuEST (Wang et al., ICCV 2025, arXiv 2402.03666): finetune few weights so that activations become easy.

Preset `fast` is our variant, for minutes on two cores: weights are rounded in closed form (GPTQ); ranges are searched
(least error) for every calibrated step; channels are smoothed below 8 activation bits; critical layers are ranked;
errors are relative to full precision's power, so that layers of any size weigh alike; learning rates of weights are in
steps of their grid; and the activation scales of the time layers learn on while critical layers are aligned.

Preset `paper`: 256 samples at each of 20 timesteps; AdaRound of all weights, 8-bit ones included, as in `q-diffusion`;
ranges of the first 64 samples of each timestep and then a moving average, momentum 0.95, searched where activations
have 4 bits; plain mean squared errors; Adam at a constant 1e-5 for weights and 1e-4 for scales, in their own units; the
paper's critical layers for what the model is conditioned on; time layers frozen while these are aligned; 2,200
iterations. The losses are the paper's: its code has only the output's error, times the number of layers. Its W4A4 has a
scale per input channel and timestep, which integer kernels cannot take out of a sum: here channels are smoothed at 4
bits, one static factor per channel, folded into the weight. A batch mixes timesteps, where the code takes one at a time
and starts Adam anew for each. `weight_rounding` says whether aligned weights keep their direction.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from stepquant.calibration.fake_quant.weight_quantizers import LeastError, RoundToNearest
from stepquant.calibration.samples import Calibration
from stepquant.pipelines.request import kind_of
from stepquant.recipes.context import Context
from stepquant.recipes.recipe import Recipe, rounding_method
from stepquant.recipes.stage import Stage
from stepquant.recipes.stages import (
    AddQuantizers,
    CalibrateRanges,
    CollectSamples,
    Finetune,
    RankLayers,
    ReconstructBlocks,
    Smooth,
)
from stepquant.settings import Iterations, Positive, Share, Weight

CRITICAL_LAYERS = {
    "attention": r"\.(to_q|to_k|to_v)$",
    "feed-forward": r"\.ff\.",
    "both": r"\.(to_q|to_k|to_v)$|\.ff\.",
}
"""The paper's lists of critical layers C_A, as regular expressions over layer names: ``attention`` for unconditional
latent models, ``feed-forward`` for Stable Diffusion, ``both`` (nearly) for class-conditional ImageNet."""

SMOOTHED_BELOW, PUBLISHED_SMOOTHED_BELOW = 8, 5
"""Activation bits below which channels are smoothed, unless the spec says otherwise."""
PUBLISHED_CRITICAL = {"unconditional": "attention", "class": "both", "text": "feed-forward"}
"""The paper's list for what a model is conditioned on."""


class QuEST(Recipe):
    """One activation scale per step; then train the time-embedding layers, and after them the critical ones.

    1. Calibration set: samples at evenly spread steps.
    2. Weights: rounded block by block while activations are in full precision; their scales stay from here on.
    3. Activations: a range for each calibrated step, or one shared by all (the paper's text has one, its code one per
       step).
    4. Temporal layer alignment (section 4.2): weights, biases and activation scales of the layers that depend on the
       timestep alone, ``L_TLA + time_global_weight L_G``.
    5. Critical module alignment (section 4.3): the critical layers' weights and all activation scales, network-wise,
       ``L_CMA + global_weight L_G``; in `paper` the time layers' scales stay.
    """

    name: ClassVar[str] = "quest"
    PRESETS: ClassVar = {
        "fast": {},
        "paper": {
            "published": True,
            "rounding": "adaround",
            "rounding_rate": 1e-3,
            "rounding_weight": 0.01,
            "rounding_iterations": 20_000,
            "time_iterations": 1100,
            "iterations": 1100,
            "batch_size": 32,
            "weight_rate": 1e-5,
            "scale_rate": 1e-4,
            "critical": "published",
        },
    }
    PUBLISHED: ClassVar = Calibration(samples=20 * 256, steps=20, trajectories=256)

    scales: Literal["per-step", "shared"] = "per-step"
    """Activation scales: one per calibrated step, or one shared by all."""
    critical: Literal["ranked", "published", "both", "attention", "feed-forward"] = "ranked"
    """Critical layers: those whose full precision lowers the output's error most, up to `critical_share` of all
    weights; one of the paper's lists; or the list that the paper has for what the model is conditioned on."""
    critical_share: Share = 0.05
    """Of all weights, that ranked critical layers have together at most."""
    rounding_iterations: Iterations = 300
    """Optimizer steps per block that weights are rounded with."""
    time_iterations: Iterations = 150
    """Optimizer steps of temporal layer alignment."""
    iterations: Iterations = 300
    """Optimizer steps of critical module alignment."""
    batch_size: Positive = 16
    """Samples per optimizer step."""
    rounding: Literal["gptq", "adaround"] = "gptq"
    """How weights below 8 bits are rounded; the paper's way is ``"adaround"``."""
    rounding_rate: Weight = 3e-2
    """Learning rate of AdaRound's variables."""
    rounding_weight: Weight = 0.1
    """Weight of AdaRound's regularizer, relative to the block's error before learning; if `published`, in the plain
    loss."""
    weight_rounding: Literal["held", "nearest"] = "held"
    """If `published`: how aligned weights are rounded, in the direction of step 2 or to nearest again."""
    weight_rate: Weight = 1e-3
    """Learning rate of aligned weights, in steps of their grid; if `published`, in their own units."""
    scale_rate: Weight = 1e-3
    """Learning rate of activation scales, relative to their size; if `published`, in their own units."""
    time_global_weight: Weight = 1.0
    """Weight of L_G in temporal layer alignment."""
    global_weight: Weight = 2.0
    """Weight of L_G in critical module alignment."""
    published: bool = False
    """Follow the paper: its errors, units of learning rates, ranges and frozen layers; 8-bit weights rounded like the
    others."""

    def fitted(self, context: Context) -> Self:
        if self.critical != "published":
            return self
        return self.replace(critical=PUBLISHED_CRITICAL[kind_of(context.pipeline)])

    def stages(self) -> list[Stage]:
        critical = CRITICAL_LAYERS.get(self.critical, "critical")
        return [
            CollectSamples(),  # 1
            AddQuantizers(
                split_skips=True,
                rows="calibrated" if self.scales == "per-step" else "one",
                rounding=LeastError if self.published else RoundToNearest,
            ),
            Smooth(below=PUBLISHED_SMOOTHED_BELOW if self.published else SMOOTHED_BELOW),
            self._round_weights(),  # 2
            CalibrateRanges(method="moving-average" if self.published else "least-error", quantized_weights=True),  # 3
            self._align("Aligning time layers", "time", self.time_iterations, self.time_global_weight),  # 4
            *([RankLayers(share=self.critical_share)] if critical == "critical" else []),
            self._align("Aligning critical layers", critical, self.iterations, self.global_weight),  # 5
        ]

    def _round_weights(self) -> ReconstructBlocks:
        rate, weight = self.rounding_rate, self.rounding_weight
        return ReconstructBlocks(
            iterations=self.rounding_iterations,
            batch_size=self.batch_size,
            rounding=rounding_method(self.rounding, rate, weight, published=self.published),
            scales=None,
            drop_probability=0.0,
        )

    def _align(self, name: str, layers: str, iterations: int, global_weight: float) -> Finetune:
        return Finetune(
            name=name,
            layers=(layers,),
            frozen=("time",) if self.published and layers != "time" else (),
            all_scales=layers != "time",
            iterations=iterations,
            batch_size=self.batch_size,
            weight_rate=self.weight_rate,
            scale_rate=self.scale_rate,
            global_weight=global_weight,
            published=self.published,
            rounding=self.weight_rounding,
        )
