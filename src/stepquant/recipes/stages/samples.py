"""Which steps the calibration samples come from, and collecting them."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from stepquant.calibration.collection import NOISE_OFFSET, collect, collect_all
from stepquant.calibration.samples import CalibrationSet
from stepquant.calibration.selection import normal_steps, uniform_steps
from stepquant.calibration.tdac import check_enough, dense_and_diverse_steps, step_features
from stepquant.files import digest
from stepquant.recipes.context import Context
from stepquant.recipes.stage import Cost, Stage, State, Workload
from stepquant.settings import Weight

FEATURE_IMAGES = 16
"""Images whose features the steps are selected by."""
TRAJECTORIES_OFFSET = 1_000_003
"""Between the seeds of one set of trajectories and the next, see `trajectories`."""


class CollectSamples(Stage):
    """Record the denoiser's inputs while the full-precision pipeline generates images."""

    selection: Literal["uniform", "normal", "tdac"] = "uniform"
    """Uniform over the steps; at timesteps ``t ~ N(mean T, (deviation T)^2)``; or by the density and diversity of the
    features at each step (EDA-DM)."""
    mean: Weight = 0.5
    deviation: Weight = 0.35
    diversity_weight: Weight = 1.0
    """lambda in ``w_i = D_i + lambda V_i`` of tdac."""
    radius: Weight | None = None
    """Mean squared distance up to which the features of two steps are alike; None: one that adapts to the model."""
    features: Literal["middle", "attention"] = "middle"
    """Of the block in the middle of the network, or of the first in that block's list of attentions, if it has one."""

    def check(self, context: Context) -> None:
        if self.selection == "tdac":
            check_enough(context.calibration.samples, context.steps)

    def cost(self, workload: Workload) -> Cost:
        calibration = workload.calibration
        images = calibration.images + (min(calibration.images, FEATURE_IMAGES) if self.selection == "tdac" else 0)
        what = f"{calibration.samples} samples from {images} images of {calibration.steps} steps"
        return Cost(what, images * calibration.steps)

    def run(self, context: Context, state: State) -> None:
        state.samples = collect_samples(context, self.steps(context))

    def steps(self, context: Context) -> Tensor:
        """The sampler step of each sample: int64 [N]."""
        count, steps = context.calibration.samples, context.steps
        if self.selection == "uniform":
            return uniform_steps(count, steps, context.generator())
        if self.selection == "normal":
            return normal_steps(count, steps, context.generator(), self.mean, self.deviation)
        name = f"steps-{digest([context.sampling_key, self.identity()])[:16]}"
        return context.cached(name, lambda: {"steps": self._dense_and_diverse(context)})["steps"]

    def _dense_and_diverse(self, context: Context) -> Tensor:
        images = min(context.calibration.images, FEATURE_IMAGES)
        middle = context.denoiser.get_submodule(context.description.middle)
        attentions: Any = getattr(middle, "attentions", None)
        if self.features == "attention" and attentions and attentions[0] is not None:
            middle = attentions[0]
        seed = context.seed + NOISE_OFFSET
        features = step_features(
            context.pipeline, context.denoiser, middle, context.request, images, seed, context.progress
        )
        count = context.calibration.samples
        return dense_and_diverse_steps(features, count, context.generator(), self.diversity_weight, radius=self.radius)


def collect_samples(context: Context, steps: Tensor) -> CalibrationSet:
    """Calibration samples at the wanted sampler steps, int64 [N]; kept in the cache. Recorded calls replace them."""
    if context.calls is not None:
        return context.calls
    return collect(
        context.pipeline,
        context.denoiser,
        context.request,
        steps,
        context.calibration,
        context.seed,
        context.progress,
        workspace=context.workspace,
        cache=context.cache,
        stage=f"samples-{digest([context.sampling_key, CollectSamples.version, steps.tolist()])[:16]}",
    )


def trajectories(context: Context, index: int) -> CalibrationSet:
    """Whole trajectories with the denoiser's outputs, other ones for every index; kept in the cache."""
    # Far from the noise of the other calibration samples, which are at most as many as `Calibration.images`.
    seed = context.seed + (1 + index) * TRAJECTORIES_OFFSET
    pipeline, denoiser, request = context.pipeline, context.denoiser, context.request
    name = f"trajectories-{digest([context.sampling_key, CollectSamples.version, index])[:16]}"

    def draw() -> CalibrationSet:
        return collect_all(pipeline, denoiser, request, context.calibration, seed, context.progress, context.component)

    return CalibrationSet.from_tensors(context.cached(name, lambda: draw().to_tensors(), shared=True))
