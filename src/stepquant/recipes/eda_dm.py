"""`eda-dm`: EDA-DM (Liu et al., arXiv 2401.04585): select samples by density and diversity, reconstruct finely.

What differs from the public code: the radius of the density adapts to the model; in `fast` weights are rounded in
closed form (GPTQ), and rates and iterations are those of `q-diffusion`, so that the recipes differ in the two ideas
alone; with AdaRound the rounding regularizer stays unless `rounding_weight` is 0, as it is in `paper`, since cutting
soft values at the end leaves a gap between what was optimized and what ships.

Missing in `paper`: TDAC reads the whole mid block and not its attention; the published radii; other rates at 8 bits.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from stepquant.recipes.recipe import BlockRecipe
from stepquant.recipes.stage import Stage
from stepquant.recipes.stages import AddQuantizers, CollectSamples, Smooth
from stepquant.settings import Weight


class EDADM(BlockRecipe):
    """Temporal distribution-aware calibration (TDAC), fine-grained block reconstruction (FBR); static scales.

    1. TDAC (section 3.2): step i gets samples in proportion to ``D_i + diversity_weight V_i``, the density and the
       diversity of the features in the middle of the network.
    2. Weights: per output channel, the range of least ``|w - w'|^2.4``; skip connections split.
    3. FBR (section 3.3): each block against the outputs of its layers too,
       ``|B_q - B_fp|^2 + layer_weight sum_l |l_q - l_fp|^2``; rounding and activation scales.
    """

    name: ClassVar[str] = "eda-dm"
    PRESETS: ClassVar = {
        "fast": {},
        "paper": {
            "iterations": 5000,
            "batch_size": 32,
            "rounding": "adaround",
            "rounding_rate": 0.5,
            "rounding_weight": 0.0,
            "scale_rate": 5e-4,
            "diversity_weight": 1.2,
        },
    }

    selection: Literal["tdac", "uniform", "normal"] = "tdac"
    """How calibration samples are selected; the others are the paper's ablations."""
    diversity_weight: Weight = 1.0
    """lambda of TDAC."""
    block_weight: Weight = 1.0
    """Weight of the error of a block's output; 0 for the paper's ablation."""
    layer_weight: Weight = 0.8
    """beta of FBR; 0 for the paper's ablation."""

    def stages(self) -> list[Stage]:
        return [
            CollectSamples(selection=self.selection, diversity_weight=self.diversity_weight, mean=0.4, deviation=0.4),
            AddQuantizers(split_skips=True),  # 2
            Smooth(),
            self.reconstruct(block_weight=self.block_weight, layer_weight=self.layer_weight),  # 3
        ]
