"""A custom recipe: samples as EDA-DM selects them, intervals as TDQ learns them, finetuning as QuEST does it.

python examples/best.py zoo:fashion-class w4a4 out/best
"""

from __future__ import annotations

import sys
from typing import ClassVar, Literal

import stepquant
from stepquant.loading import resolve_pipeline
from stepquant.optimize.reconstruction import LearnScales
from stepquant.recipes import Recipe, Stage
from stepquant.recipes.stages import AddQuantizers, CollectSamples, Finetune, RankLayers, ReconstructBlocks, Smooth
from stepquant.settings import Iterations, Weight


class Best(Recipe):
    """Dense and diverse samples, smoothed channels, intervals over time, blocks rebuilt, critical layers aligned."""

    name: ClassVar[str] = "best"

    intervals: Literal["table", "generator"] = "table"
    """A grid for every calibrated step, shaped by its neighbours' samples as well; or TDQ's generator."""
    iterations: Iterations = 300
    """Optimizer steps per block."""
    finetuning: Iterations = 300
    """Optimizer steps of finetuning."""
    rate: Weight = 1e-3
    """Learning rate of finetuned weights, in steps of their grid."""

    def stages(self) -> list[Stage]:
        return [
            CollectSamples(selection="tdac"),  # EDA-DM
            AddQuantizers(split_skips=True, rows="training"),
            Smooth(below=8),
            ReconstructBlocks(  # TDQ
                iterations=self.iterations, scales=LearnScales(over_time=self.intervals, neighbours=2)
            ),
            RankLayers(samples=32, share=0.05),
            Finetune(  # QuEST's TLA and CMA together
                layers=("time", "critical"),
                iterations=self.finetuning,
                weight_rate=self.rate,
                global_weight=2.0,
                over_time=self.intervals == "generator",
            ),
        ]


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python examples/best.py MODEL BITS FOLDER")
    model, bits, folder = sys.argv[1:]
    stepquant.save(stepquant.quantize(resolve_pipeline(model), bits, recipe=Best()), folder)
