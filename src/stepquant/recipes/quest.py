"""`quest`: QuEST (Wang et al., ICCV 2025, arXiv 2402.03666): finetune few weights so that activations become easy.

What differs from the public code: ranges are searched (least error) for every calibrated step, at all bit widths,
instead of an average of min and max; where the code has a scale per input channel (4-bit activations), channels are
smoothed (below 8 bits): one static factor per channel, folded into the weight, since integer kernels cannot take a
scale per input channel out of a sum; errors are relative to full precision's power, so that layers of any size weigh
alike; learning rates of weights are in steps of their grid; the activation scales of the time layers learn on while
critical modules are aligned, where the paper leaves these layers as they are. Learning rates and iterations of `fast`
fit minutes on two cores.

Missing in `paper`: ranges by a moving average; 256 samples per timestep at 20 timesteps are up to the calibration;
published learning rates, which are of weights and not of steps of their grid; 8-bit weights are not reconstructed.
"""

from __future__ import annotations

from typing import ClassVar, Literal

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

SMOOTHED_BELOW = 8
"""Activation bits below which channels are smoothed, unless the spec says otherwise."""


class QuEST(Recipe):
    """One activation scale per step; then train the time-embedding layers, and after them the critical ones.

    1. Calibration set: samples at evenly spread steps.
    2. Weights: rounded block by block while activations are in full precision; their scales stay from here on.
    3. Activations: a range for each calibrated step, or one shared by all (the paper's text has one, its code one per
       step).
    4. Temporal layer alignment (section 4.2): weights, biases and activation scales of the layers that depend on the
       timestep alone, ``L_TLA + time_global_weight L_G``.
    5. Critical module alignment (section 4.3): the critical layers' weights and all activation scales, those of the
       time layers too, network-wise, ``L_CMA + global_weight L_G``.
    """

    name: ClassVar[str] = "quest"
    PRESETS: ClassVar = {
        "fast": {},
        "paper": {
            "rounding": "adaround",
            "rounding_rate": 1e-3,
            "rounding_iterations": 20_000,
            "time_iterations": 1100,
            "iterations": 1100,
            "batch_size": 32,
            "critical": "attention",
        },
    }

    scales: Literal["per-step", "shared"] = "per-step"
    """Activation scales: one per calibrated step, or one shared by all."""
    critical: Literal["ranked", "both", "attention", "feed-forward"] = "ranked"
    """Critical layers: those whose full precision lowers the output's error most, up to `critical_share` of all
    weights; or one of the paper's lists."""
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
    """Weight of AdaRound's regularizer, relative to the block's error before learning."""
    weight_rate: Weight = 1e-3
    """Learning rate of aligned weights, in steps of their grid."""
    scale_rate: Weight = 1e-3
    """Learning rate of activation scales, relative to their size."""
    time_global_weight: Weight = 1.0
    """Weight of L_G in temporal layer alignment."""
    global_weight: Weight = 2.0
    """Weight of L_G in critical module alignment."""

    def stages(self) -> list[Stage]:
        critical = CRITICAL_LAYERS.get(self.critical, "critical")
        return [
            CollectSamples(),  # 1
            AddQuantizers(split_skips=True, rows="calibrated" if self.scales == "per-step" else "one"),
            Smooth(below=SMOOTHED_BELOW),
            self._round_weights(),  # 2
            CalibrateRanges(quantized_weights=True),  # 3
            self._align("Aligning time layers", "time", self.time_iterations, self.time_global_weight),  # 4
            *([RankLayers(share=self.critical_share)] if critical == "critical" else []),
            self._align("Aligning critical layers", critical, self.iterations, self.global_weight),  # 5
        ]

    def _round_weights(self) -> ReconstructBlocks:
        return ReconstructBlocks(
            iterations=self.rounding_iterations,
            batch_size=self.batch_size,
            rounding=rounding_method(self.rounding, self.rounding_rate, self.rounding_weight),
            scales=None,
            drop_probability=0.0,
        )

    def _align(self, name: str, layers: str, iterations: int, global_weight: float) -> Finetune:
        return Finetune(
            name=name,
            layers=(layers,),
            all_scales=layers != "time",
            iterations=iterations,
            batch_size=self.batch_size,
            weight_rate=self.weight_rate,
            scale_rate=self.scale_rate,
            global_weight=global_weight,
        )
