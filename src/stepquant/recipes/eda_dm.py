"""`eda-dm`: EDA-DM (Liu et al., arXiv 2401.04585): select samples by density and diversity, reconstruct finely.

Preset `fast` is our variant: weights are rounded in closed form (GPTQ), and rates and iterations are those of
`q-diffusion`, so that the recipes differ in the two ideas alone; the radius of the density adapts to the model;
features are those of the whole block in the middle; and the layer that a block's output stands for is not compared,
which is not the one that executes last where a shortcut does.

Preset `paper` follows the public code: features of the attention in the middle of the network, the published radius,
lambda, beta and learning rates of the most similar model (`PUBLISHED_VALUES`), QDrop 0.5 with AdaRound of all weights,
8-bit ones included, rates that fall along a cosine, 5,000 iterations of 32, layers compared but the last executed, and
no regularizer: soft roundings are cut at the end, and how much that costs is reported. Set `rounding_weight` to close
the gap. Against that code, the samples' rounding is repaired by largest remainders, and a density that is the same for
all steps counts 1, where the code divides 0 by 0. Without an attention in the middle, the whole block is read.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple, Self

from stepquant.calibration.samples import Calibration
from stepquant.pipelines.request import kind_of
from stepquant.recipes.context import Context
from stepquant.recipes.recipe import BlockRecipe, published_adaround
from stepquant.recipes.stage import Stage
from stepquant.recipes.stages import AddQuantizers, CollectSamples, Smooth
from stepquant.settings import Weight


class Values(NamedTuple):
    """Hyperparameters that the public code sets model by model; rates at 4 and at 8 bits."""

    diversity_weight: float
    radius: float
    layer_weight: float
    rounding_rates: tuple[float, float]
    scale_rates: tuple[float, float]


PUBLISHED_VALUES = {
    "pixels": Values(1.2, 3.0, 0.8, (0.5, 0.05), (5e-4, 1e-3)),  # CIFAR-10
    "unconditional": Values(1.0, 0.3, 1.0, (1e-2, 5e-4), (5e-3, 1e-4)),  # LSUN
    "class": Values(0.5, 3.0, 1.3, (0.5, 0.5), (1e-4, 1e-4)),  # ImageNet
    "text": Values(5.0, 0.3, 0.8, (3e-2, 5e-4), (1e-4, 1e-4)),  # Stable Diffusion
}
"""By what a model is conditioned on; ``"pixels"`` for one without a VAE."""


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
            "published": True,
            "iterations": 5000,
            "batch_size": 32,
            "rounding": "adaround",
            "rounding_rate": None,
            "rounding_weight": 0.0,
            "scale_rate": None,
            "diversity_weight": None,
            "layer_weight": None,
            "mean": 0.5,
            "deviation": 0.35,
        },
    }
    PUBLISHED: ClassVar = Calibration(samples=1024, steps=100, trajectories=1024)

    selection: Literal["tdac", "uniform", "normal"] = "tdac"
    """How calibration samples are selected; the others are the paper's ablations."""
    mean: Weight = 0.4
    """Mean timestep of the selection ``"normal"``, as a share of T."""
    deviation: Weight = 0.4
    """Standard deviation of its timesteps, as a share of T."""
    rounding_rate: Weight | None = 3e-2  # type: ignore[assignment]
    """Learning rate of AdaRound's variables; None: the published one for the model and bits."""
    scale_rate: Weight | None = 1e-3  # type: ignore[assignment]
    """Learning rate of activation scales, relative to their size, if `published` in their own units; None: likewise."""
    diversity_weight: Weight | None = 1.0
    """lambda of TDAC; None: likewise."""
    radius: Weight | None = None
    """Of TDAC's density, a mean squared distance; None: one that adapts to the model, if `published` likewise."""
    block_weight: Weight = 1.0
    """Weight of the error of a block's output; 0 for the paper's ablation."""
    layer_weight: Weight | None = 0.8
    """beta of FBR; 0 for the paper's ablation; None: likewise."""

    def fitted(self, context: Context) -> Self:
        kind = "pixels" if getattr(context.pipeline, "vae", None) is None else kind_of(context.pipeline)
        values, bits = PUBLISHED_VALUES[kind], int(context.spec.default_bits.weight >= 8)
        published = {
            "rounding_rate": values.rounding_rates[bits],
            "scale_rate": values.scale_rates[bits],
            "diversity_weight": values.diversity_weight,
            "layer_weight": values.layer_weight,
            "radius": values.radius if self.published else None,
        }
        return self.replace(**{name: value for name, value in published.items() if getattr(self, name) is None})

    def stages(self) -> list[Stage]:
        return [
            self._select(),  # 1
            AddQuantizers(split_skips=True, rounding=self.weights),  # 2
            Smooth(),
            self.reconstruct(  # 3
                block_weight=self.block_weight,
                layer_weight=_decided(self.layer_weight),
                **(self._published() if self.published else {}),
            ),
        ]

    def _select(self) -> CollectSamples:
        return CollectSamples(
            selection=self.selection,
            diversity_weight=_decided(self.diversity_weight),
            radius=self.radius,
            features="attention" if self.published else "middle",
            mean=self.mean,
            deviation=self.deviation,
        )

    def _published(self) -> dict[str, Any]:
        rounding = published_adaround(_decided(self.rounding_rate), self.rounding_weight, decay=True)
        return {"rounding": rounding, "drop_probability": 0.5, "left_out": "last"}


def _decided(value: float | None) -> float:
    """A hyperparameter that `EDADM.fitted` has decided."""
    assert value is not None
    return value
