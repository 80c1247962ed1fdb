"""`eda-dm`: EDA-DM (Liu et al., arXiv 2401.04585): select samples by density and diversity, reconstruct finely.

What differs from the public code: the radius of the density adapts to the model; weights are gptq-rounded in closed form
by default, and with ``rounding="adaround"`` the rounding regulariser stays, since cutting soft values at the end leaves
a gap between what was optimised and what ships; rates and iterations are those of `q-diffusion`, so that the recipes
differ in the two ideas alone.
"""

from __future__ import annotations

from typing import Literal

from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.selection import normal_steps, uniform_steps
from stepquant.optimize.blocks import Rounding, Settings
from stepquant.recipes.job import Job


def eda_dm(
    job: Job,
    *,
    selection: Literal["density-diversity", "uniform", "normal"] = "density-diversity",
    diversity_weight: float = 1.0,
    block_weight: float = 1.0,
    layer_weight: float = 0.8,
    iterations: int = 500,
    batch_size: int = 16,
    rounding: Rounding = "gptq",
    rounding_rate: float = 3e-2,
    scale_rate: float = 1e-3,
    rounding_weight: float = 0.1,
) -> CalibrationModel:
    """Temporal distribution-aware calibration (TDAC), fine-grained block reconstruction (FBR); static scales.

    1. TDAC (section 3.2): step i gets samples in proportion to ``D_i + diversity_weight V_i``, the density and the
       diversity of the features in the middle of the network.
    2. Weights: per output channel, the range of least ``|w - w'|^2.4``; skip connections split.
    3. FBR (section 3.3): each block against the outputs of its layers too,
       ``|B_q - B_fp|^2 + layer_weight sum_l |l_q - l_fp|^2``; rounding and activation scales.

    The paper's ablations: another `selection`, ``layer_weight=0`` (the block only), ``block_weight=0`` (layers only).
    """
    count, steps = job.calibration.samples, job.request.steps
    if selection == "density-diversity":
        chosen = job.dense_and_diverse_steps(diversity_weight)
    else:
        select = uniform_steps if selection == "uniform" else normal_steps
        chosen = select(count, steps, job.generator())
    samples = job.collect(chosen)
    model = job.instrument(weight_range="least-error", split_skips=True)
    settings = Settings(
        iterations=iterations,
        batch_size=batch_size,
        rounding=rounding,
        rounding_rate=rounding_rate,
        scale_rate=scale_rate,
        rounding_weight=rounding_weight,
        block_weight=block_weight,
        layer_weight=layer_weight,
    )
    job.reconstruct(model, samples, settings)
    return model
