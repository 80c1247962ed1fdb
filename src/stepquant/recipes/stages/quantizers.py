"""Put quantizers on the denoiser, smooth its channels, find its ranges."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from stepquant.calibration.fake_quant.observer import ActivationRange
from stepquant.calibration.fake_quant.weight_quantizers import RoundToNearest
from stepquant.calibration.model import calibrate_ranges, insert_fake_quantizers
from stepquant.calibration.placement import place
from stepquant.calibration.silu import layers_behind_silu
from stepquant.calibration.smoothing import find_smoothing
from stepquant.core.ranges import Range
from stepquant.models.denoisers import scheduler_of
from stepquant.pipelines.schedule import as_seen, training_timesteps
from stepquant.recipes.context import Context
from stepquant.recipes.stage import Cost, Stage, State, Workload
from stepquant.settings import Count


class AddQuantizers(Stage):
    """Copy the denoiser and put quantizers on its weights, which get their ranges, and on its activations."""

    weight_range: Range = "least-error"
    """How the range of each output channel is found."""
    split_skips: bool = False
    """Quantize the two sides of a skip concatenation apart, unless the spec says otherwise."""
    rows: Literal["one", "calibrated", "training"] = "one"
    """Scales of an activation: one for all steps, unless the spec has other bits for some; one for each step that was
    calibrated; or one for each timestep of training."""
    rows_of: Literal["all", "time"] = "all"
    """Which layers' activations have these rows: all, or the layers that depend on the timestep alone."""
    rounding: type[RoundToNearest] = RoundToNearest
    """Rounds weights that are not learned: a class with the interface of `RoundToNearest`."""
    activations: Literal["affine", "signed"] = "affine"
    """Grids of activations: affine; or symmetric, and behind SiLU from its smallest value up (TDQ)."""

    def run(self, context: Context, state: State) -> None:
        spec = context.spec
        if spec.split_skips is None:
            spec = spec.model_copy(update={"split_skips": self.split_skips})
        state.model = insert_fake_quantizers(
            context.reference,
            context.description,
            spec,
            timesteps=(timesteps := self._timesteps(context, state)),
            times=[] if timesteps is None or not spec.step_bits else state.samples.times(timesteps, context.steps),
            tabled=None if self.rows_of == "all" else context.description.time_layers,
            weight_range=self.weight_range,
            progress=context.progress,
            ranks=context.workspace.ranks,
            rounding=self.rounding,
        )
        if self.activations == "signed":
            state.model.use_signed_grids(self._behind_silu(context, state))
        place(state.model.model, context.description.blocks, context.device)

    def _behind_silu(self, context: Context, state: State) -> frozenset[str]:
        arguments = state.samples.arguments(slice(0, 1))
        return layers_behind_silu(context.reference, state.model.layers, lambda: context.reference(**arguments))

    def _timesteps(self, context: Context, state: State) -> Tensor | None:
        """Of the rows of activation tables, as the denoiser is given them: float [R]; None for one row."""
        if self.rows == "one" and not context.spec.step_bits:
            return None
        seen = state.samples.timesteps
        if self.rows != "training":
            return seen.unique()
        timesteps = training_timesteps(scheduler_of(context.pipeline, context.component))
        return as_seen(timesteps, seen, state.samples.steps)


class Smooth(Stage):
    """Move differences between an activation's channels into the weight (SmoothQuant), where a layer improves.

    Applies if the spec sets smoothing; if it leaves the choice to the recipe, below `below` activation bits.
    """

    below: Count = 0

    def wanted(self, context: Context) -> bool:
        spec = context.spec
        return spec.default_bits.activation < self.below if spec.smoothing is None else spec.smoothing

    def cost(self, workload: Workload) -> Cost:
        return Cost("smooth channels", workload.calibration.samples if self.below else 0)

    def run(self, context: Context, state: State) -> None:
        if not self.wanted(context):
            return
        model, samples = state.model, state.samples
        factors = context.cached(
            self.key(context, state), lambda: find_smoothing(model, samples, context.chunk, context.progress)
        )
        for name, smoothing in factors.items():
            model.layers[name].smooth(smoothing)


class CalibrateRanges(Stage):
    """Set the range of every activation from what the whole network does on the samples."""

    method: ActivationRange = "least-error"
    per_row: bool = True
    """A range for every table row; else one for all."""
    quantized_weights: bool = False
    """Observe what the quantized weights make of the samples, not the full-precision ones."""

    def cost(self, workload: Workload) -> Cost:
        return Cost("calibrate ranges", workload.calibration.samples)

    def run(self, context: Context, state: State) -> None:
        calibrate_ranges(
            state.model,
            state.samples,
            self.method,
            context.chunk,
            context.progress,
            per_row=self.per_row,
            quantized_weights=self.quantized_weights,
            ranks=context.workspace.ranks,
        )
