"""How blocks are reconstructed: rounding of weights, learning of scales, and the error that is minimized."""

from __future__ import annotations

from typing import Literal

from stepquant.calibration.fake_quant.generator import Generation
from stepquant.calibration.fake_quant.observer import ActivationRange
from stepquant.core.rounding import annealed_beta, linear_beta
from stepquant.settings import Count, Iterations, Positive, Settings, Share, Weight

WARMUP = 0.2
"""Share of the iterations before AdaRound's regularizer begins in the published algorithms."""


class GPTQ(Settings):
    """Round in closed form before scales are learned (`stepquant.optimize.gptq`), then move weights within cells."""

    rate: Weight = 2e-2
    """Learning rate of the weights, in steps of their grid, through the rounding (straight through); 0 leaves them as
    they were rounded."""
    below: Positive = 8
    """Weights of fewer bits are rounded so, the others to nearest: at 8 bits that leaves so little error that GPTQ adds
    more than it removes (``docs/results/defaults.md``)."""


class AdaRound(Settings):
    """Learn whether each weight is rounded up or down, together with the scales (arXiv 2004.10568)."""

    rate: Weight = 3e-2
    """Learning rate of the rounding variables."""
    regularizer: Weight = 0.1
    """Weight of the rounding regularizer, relative to the block's error before learning. Errors and regularizer are
    both measured in units of their start (1 each), so that one value serves all layers."""
    below: Positive = 8
    """Weights of fewer bits are rounded so, the others to nearest."""
    published: bool = False
    """The loss of BRECQ's public code: the regularizer is a sum over all weights, added to the plain squared error
    after a fifth of the iterations, with beta falling along a line."""
    decay: bool = True
    """With `published`: let the learning rate fall to 0 along a cosine; else it stays."""

    def weight_and_beta(self, progress: float, weights: int) -> tuple[float, float]:
        """Factor and exponent of the summed regularizer of `weights` variables at `progress` in [0, 1]."""
        if not self.published:
            return self.regularizer / weights, annealed_beta(progress)
        return (self.regularizer if progress >= WARMUP else 0.0), linear_beta(progress, WARMUP)


class LearnScales(Settings):
    """Find the ranges of a block's activations on what reaches them, and learn their scales."""

    method: ActivationRange = "least-error"
    rate: Weight = 1e-3
    """Learning rate of the logarithm of each scale, so relative to its size; of a generator's network."""
    relative: bool = True
    """Learn gains on the scales; else the scales themselves, as public code does, with the rate in their units."""
    over_time: Literal["table", "generator"] = "table"
    """How scales depend on the table row, where tables have more than one: ranges found and gains learned row by row,
    or one range for all rows and a network (TDQ) that bends it."""
    generation: Generation = Generation()
    """Of the network."""
    neighbours: Count = 0
    """Of a table: calibrated steps on either side whose samples have a say in the range of a step. A step has few
    samples, and a range that fits them alone clips what other images need."""
    calibrate: bool = True
    """Find the ranges; else they are as an earlier stage found them."""


class Reconstruction(Settings):
    """How a block is reconstructed: by Adam, with rates that fall to 0 along a cosine."""

    iterations: Iterations = 500
    """Optimizer steps per block."""
    batch_size: Positive = 16
    """Samples per step."""
    rounding: GPTQ | AdaRound | None = GPTQ()
    """None: weights stay as they are."""
    scales: LearnScales | None = LearnScales()
    """None: activations stay in full precision, and weights alone are reconstructed."""
    drop_probability: Share | None = None
    """QDrop's probability that an element stays in full precision; None: 0.5 under AdaRound, as QDrop has it, and 0
    for GPTQ, whose weights fit the quantized inputs that it would take from them."""
    block_weight: Weight = 1.0
    """Weight of the error of the block's output."""
    layer_weight: Weight = 0.0
    """Weight of the summed errors of its layers' outputs (EDA-DM's beta): all but one, unless `block_weight` is 0."""
    left_out: Literal["final", "last"] = "final"
    """The layer that is not compared: the one that the block's output stands for (`Block.final_layer`), or the one that
    is executed last, a shortcut included."""
    power: Weight = 2.0
    """Exponent of the error."""
    time_layers: bool = True
    """Reconstruct the layers that depend on the timestep alone, too; else their weights and scales stay as they are."""

    @property
    def dropped(self) -> float:
        """`drop_probability`, decided."""
        if self.drop_probability is not None:
            return self.drop_probability
        return 0.5 if isinstance(self.rounding, AdaRound) else 0.0
