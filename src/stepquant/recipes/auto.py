"""`auto`: measured on a few images, the activations that lose least, and bits where a target needs them.

Every choice is made by the PSNR of images generated with a candidate, and printed. The images start from other noise
than those of the calibration and of the check at the end. Candidates have weights of 8 bits, so that only activations
differ. A costlier candidate has to gain `GAIN` dB: a table costs nothing at run time, dynamic ranges cost a reduction,
groups a scale for each of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, NamedTuple, Self

from torch import Tensor

from stepquant.calibration.allocation import mean_weight_bits, weight_sizes
from stepquant.config import FLOAT_BITS, QuantSpec
from stepquant.errors import StepquantError
from stepquant.layers.install import Quantization
from stepquant.optimize.reconstruction import LearnScales
from stepquant.quality.blame import Trial
from stepquant.quality.held_out import IMAGES, HeldOut, HeldOutCalls, HeldOutImages
from stepquant.quality.size import SCALE_BITS, relative_size
from stepquant.recipes.context import Context
from stepquant.recipes.recipe import Recipe
from stepquant.recipes.rounded import to_nearest
from stepquant.recipes.sensitivity import spec_within_budget
from stepquant.recipes.stage import Stage
from stepquant.recipes.stages import AddQuantizers, CollectSamples, ReconstructBlocks, Smooth
from stepquant.settings import Iterations, Positive, Share, Weight

GAIN = 0.5
"""Decibels that a candidate has to gain over a cheaper one."""
GROUPS = (64, 32)
LOW, HIGH = 4, 8
"""Weight bits that a target is reached with, beside floating point."""

Activations = Literal["measured", "static", "per-step", "dynamic"]


class Candidate(NamedTuple):
    """How activations are quantized."""

    activations: Activations
    group_size: int | None

    def __str__(self) -> str:
        return self.activations if self.group_size is None else f"{self.activations} in groups of {self.group_size}"


class Auto(Recipe):
    """Measure on a few images which activations lose least, and which bits reach a target.

    1. Weights, if there is a target: 4 bits, and 8 for the layers that suffer most within `size`.
    2. Activations: static, per step, dynamic, dynamic in groups of channels; the best by PSNR, a costlier one only for
       half a decibel more. Groups are tried below 8 weight bits, and where `size` has room for their scales.
    3. Weights below 8 bits are rounded in closed form (GPTQ); scales of static activations are learned.
    4. Until `psnr`, or without targets the check's floor, holds: the parts that cause most error get 8 bits, then
       activations in floating point, then weights.
    """

    name: ClassVar[str] = "auto"

    psnr: Weight | None = None
    """Decibels to reach, with as few bits as that takes; of audio the signal-to-noise ratio."""
    size: Share | None = None
    """Largest size of the denoiser, relative to float32. With `psnr` as well, it is an error if that takes more."""
    activations: Activations = "measured"
    """Of what kind activations are, if it is not to be measured."""
    iterations: Iterations = 100
    """Optimizer steps per block of static activations."""
    steps: Positive = 10
    """Most steps of the images that candidates are measured on."""

    @property
    def raises(self) -> bool:
        return self.psnr is not None or self.size is None

    @property
    def target(self) -> float | None:
        return self.psnr

    def stages(self) -> list[Stage]:
        static = self.activations in ("static", "per-step")
        table = self.activations == "per-step"
        scales = LearnScales(over_time="table", neighbours=2) if table else LearnScales()
        return [
            CollectSamples(),
            AddQuantizers(split_skips=True, rows="training" if table else "one"),
            Smooth(),
            ReconstructBlocks(iterations=self.iterations if static else 0, scales=scales if static else None),  # 3
        ]

    def search(self, context: Context) -> tuple[Self, Context]:
        context = replace(context, spec=self._weights(context))  # 1
        if context.spec.default_bits.activation == FLOAT_BITS:
            return self.replace(activations="dynamic"), context
        candidates = self._candidates(context)
        best = candidates[0] if len(candidates) == 1 else self._best(context, candidates)  # 2
        kind: Literal["static", "dynamic"] = "dynamic" if best.activations == "dynamic" else "static"
        spec = context.spec.model_copy(update={"activations": kind, "group_size": best.group_size})
        return self.replace(activations=best.activations), replace(context, spec=spec)

    def accept(self, context: Context, quantization: Quantization) -> None:
        found, spec = relative_size(quantization, context.denoiser), context.spec
        groups = "" if spec.group_size is None else f" in groups of {spec.group_size}"
        context.progress.note(f"auto: {spec.bits}, {spec.activations} activations{groups}, {found:.3f}x of float32.")
        if self.size is not None and self.psnr is not None and found > self.size:
            raise StepquantError(
                f"size of recipe auto is {self.size:g}, but psnr={self.psnr:g} takes {found:.3f}. Set more, or leave "
                "one out."
            )

    def _weights(self, context: Context) -> QuantSpec:
        """The spec with weight bits for the target."""
        spec = context.spec
        low = spec.model_copy(update={"bits": f"w{LOW}a{spec.default_bits.activation}"})
        if self.psnr is not None:
            return low
        if self.size is None:
            return spec
        budget = self._mean_bits(context, low)
        if budget >= HIGH:
            return spec.model_copy(update={"bits": f"w{HIGH}a{spec.default_bits.activation}"})
        bits = context.description.quantized_bits(low)
        least = mean_weight_bits(bits, weight_sizes(context.denoiser, bits))
        if budget < least:
            smallest = self.size + (least - budget) / 32
            raise StepquantError(
                f"size of recipe auto is {self.size:g}; expected at least {smallest:.3f}, which 4 bits take. Set more."
            )
        return spec_within_budget(replace(context, spec=low), budget)

    def _mean_bits(self, context: Context, spec: QuantSpec) -> float:
        """Mean bits of a quantized weight that `size` leaves room for."""
        assert self.size is not None
        layers = context.description.quantized_bits(spec)
        sizes = weight_sizes(context.denoiser, layers)
        every = sum(parameter.numel() for parameter in context.denoiser.parameters())
        rest = every - sum(sizes.values())
        return (32 * (self.size * every - rest) - _scale_bits(context, list(layers), spec.group_size)) / sum(
            sizes.values()
        )

    def _candidates(self, context: Context) -> list[Candidate]:
        spec = context.spec
        if self.activations != "measured":
            return [Candidate(self.activations, spec.group_size)]
        if spec.activations == "dynamic":
            kinds: list[Activations] = ["dynamic"]
        else:
            kinds = ["static", "dynamic"] if context.calls is not None else ["static", "per-step", "dynamic"]
        found = [Candidate(kind, spec.group_size) for kind in kinds]
        if spec.group_size is None:
            found += [Candidate("dynamic", group) for group in GROUPS if self._fits(context, group)]
        return found

    def _fits(self, context: Context, group: int) -> bool:
        """Whether there is room for the scales of groups."""
        spec = context.spec.model_copy(update={"group_size": group})
        if self.size is None:
            return spec.default_bits.weight < HIGH
        bits = context.description.quantized_bits(spec)
        return mean_weight_bits(bits, weight_sizes(context.denoiser, bits)) <= self._mean_bits(context, spec)

    def _best(self, context: Context, candidates: list[Candidate]) -> Candidate:
        """The candidate of most fidelity, cheaper ones first."""
        held_out = _held_out(context, self.steps)
        blocks = tuple(context.description.blocks)
        trial = Trial(held_out, context.component, context.denoiser, context.spec, "auto", blocks, context.device)
        best, highest, figures = candidates[0], float("-inf"), []
        with context.progress.task("Comparing activations", len(candidates)) as advance:
            for candidate in candidates:
                decibels = trial.decibels(_rounded(context, candidate))
                figures.append(f"{candidate} {decibels:.1f} dB")
                advance(1)
                if decibels >= highest + GAIN:
                    best, highest = candidate, decibels
        activations = f"a{context.spec.default_bits.activation}"
        context.progress.note(
            f"auto: activations ({activations}, {held_out.count} samples of {held_out.steps} steps): "
            f"{', '.join(figures)}; {best} are taken."
        )
        return best


def _scale_bits(context: Context, layers: list[str], group: int | None) -> int:
    """Bits of the scales and zero points of all weights."""
    bits = 0
    for name in layers:
        weight: Tensor = context.denoiser.get_submodule(name).weight  # type: ignore[assignment]
        bits += SCALE_BITS * weight.shape[0] * (1 if group is None else -(-weight.shape[1] // group))
    return bits


def _held_out(context: Context, steps: int) -> HeldOut:
    """Samples behind those of the check; of recorded calls the last few."""
    if context.calls is not None:
        count = len(context.calls)
        every = max(1, count // IMAGES)
        chosen = context.calls.numbers.argsort()[::every][:IMAGES].sort().values
        return HeldOutCalls.of(context.denoiser, context.calls.subset(chosen))
    request = replace(context.request, steps=min(steps, context.request.steps))
    return HeldOutImages.generate(context.pipeline, request, context.calibration.images + IMAGES, IMAGES, context.seed)


def _rounded(context: Context, candidate: Candidate) -> Quantization:
    """Everything at 8 weight bits, rounded to nearest, with these activations."""
    dynamic = candidate.activations == "dynamic"
    spec = context.spec.model_copy(
        update={
            "bits": f"w{HIGH}a{context.spec.default_bits.activation}",
            "activations": "dynamic" if dynamic else "static",
            "group_size": candidate.group_size,
        }
    )
    rows: Literal["calibrated", "one"] = "calibrated" if candidate.activations == "per-step" else "one"
    return to_nearest(context, spec, AddQuantizers(split_skips=True, rows=rows))
