"""What a recipe is given: the model, what to make of it, and the stages that all recipes share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.allocation import weight_sizes, within_budget
from stepquant.calibration.correction import estimate_correction
from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.weight import WeightPoint
from stepquant.calibration.fake_quant.weight_quantizers import RoundToNearest
from stepquant.calibration.float32 import computing_in_float32
from stepquant.calibration.model import CalibrationModel, calibrate_ranges, insert_fake_quantizers
from stepquant.calibration.placement import place
from stepquant.calibration.samples import (
    NOISE_OFFSET,
    OUTPUT,
    SHARED,
    Calibration,
    CalibrationSet,
    collect,
    collect_all,
)
from stepquant.calibration.selection import uniform_steps
from stepquant.calibration.sensitivity import How, Sensitivity, measure
from stepquant.calibration.smoothing import find_smoothing
from stepquant.calibration.tdac import check_enough, dense_and_diverse_steps, step_features
from stepquant.config import QuantSpec
from stepquant.core.ranges import Range
from stepquant.errors import StepquantError
from stepquant.files import digest, fingerprint, tensors_digest
from stepquant.layers.correction import Correction
from stepquant.models import ModelDescription, chunk_size, describe
from stepquant.optimize.blocks import Settings, reconstruct
from stepquant.optimize.network import Finetuning, finetune
from stepquant.pipelines.generate import Request
from stepquant.progress import Progress
from stepquant.workspace import Workspace

RANKING_SAMPLES = 64
"""Calibration samples that a ranking of layers looks at."""
RANKING_TRAJECTORIES = 16
"""Images drawn for them."""
TRAJECTORIES_OFFSET = 1_000_003
"""Between the seeds of one set of trajectories and the next, see `Job.trajectories`."""
CORRECTION_OFFSET = 3_000_500_000
"""Added to the seed of the images that a correction is estimated on: some half a million from every multiple of
`TRAJECTORIES_OFFSET`, and far behind calibration and evaluation; all of them modulo 2^32, which is what generators on
the CPU take of a seed."""
FEATURE_IMAGES = 16
"""Images whose features the steps are selected by."""


@dataclass(frozen=True)
class Job:
    """One quantization of one pipeline.

    Attributes:
        pipeline: the full-precision diffusers pipeline; never modified.
        denoiser: its UNet or transformer.
        spec: bits and overrides.
        calibration: how many samples, over how many steps.
        request: the conditions that calibration images are drawn with.
        seed: of everything random.
        workspace: keeps finished stages.
        progress: is told how far the work is.
        cache: keeps calibration samples for other jobs of the same model, request and seed; by default they lie in
            `workspace`.
        device: where blocks compute, one at a time; None: where the denoiser is.
    """

    pipeline: Any
    denoiser: nn.Module
    spec: QuantSpec
    calibration: Calibration
    request: Request
    seed: int
    workspace: Workspace
    progress: Progress = field(default_factory=Progress)
    cache: Workspace | None = None
    device: torch.device | None = None

    @cached_property
    def reference(self) -> nn.Module:
        """What the quantized denoiser is fitted to: the denoiser, computing in float32 whatever its weights are in."""
        return computing_in_float32(self.denoiser)

    @cached_property
    def description(self) -> ModelDescription:
        return describe(self.denoiser)

    @cached_property
    def sampling_key(self) -> str:
        """Stands for all inputs of sampling, and so for whatever is seen on trajectories, at any bits."""
        others = {
            name: part
            for name, part in self.pipeline.components.items()
            if isinstance(part, nn.Module) and part is not self.denoiser
        }
        return digest(
            [
                tensors_digest(dict(self.denoiser.state_dict())),
                # What encodes prompts and images.
                {name: _weights_digest(part) for name, part in others.items()},
                self.calibration.model_dump(),
                self.chunk,
                [list(self.request.conditions), self.request.steps, self.request.guidance],
                fingerprint(self.request.inputs),
                type(self.pipeline.scheduler).__name__,
                {name: str(value) for name, value in sorted(self.pipeline.scheduler.config.items())},
                self.seed,
            ]
        )

    @cached_property
    def chunk(self) -> int:
        """Samples that pass through the model at a time."""
        return chunk_size(self.denoiser)

    @cached_property
    def key(self) -> str:
        """Stands for all inputs of the job: stages kept under it are valid for the same inputs only."""
        return digest([self.sampling_key, self.spec.model_dump()])

    def generator(self) -> torch.Generator:
        """A generator seeded by the job."""
        return torch.Generator().manual_seed(self.seed)

    def collect(self, steps: Tensor) -> CalibrationSet:
        """Calibration samples at the wanted sampler steps, int64 [N]; kept in the cache."""
        return collect(
            self.pipeline,
            self.denoiser,
            self.request,
            steps,
            self.calibration,
            self.seed,
            self.progress,
            workspace=self.workspace,
            cache=self.cache,
            stage=f"samples-{digest([self.sampling_key, steps.tolist()])[:16]}",
        )

    def trajectories(self, index: int) -> CalibrationSet:
        """Whole trajectories with the denoiser's outputs, other ones for every index; kept in the cache."""
        # Far from the noise of the other calibration samples, which are at most as many as `Calibration.images`.
        seed = self.seed + (1 + index) * TRAJECTORIES_OFFSET

        def compute() -> CalibrationSet:
            return collect_all(self.pipeline, self.denoiser, self.request, self.calibration, seed, self.progress)

        return self._kept_samples(f"trajectories-{digest([self.sampling_key, index])[:16]}", compute)

    def _kept_samples(self, stage: str, compute: Callable[[], CalibrationSet]) -> CalibrationSet:
        def tensors() -> dict[str, Tensor]:
            samples = compute()
            shared = {f"{SHARED}{name}": tensor for name, tensor in samples.shared.items()}
            answers = {} if samples.outputs is None else {OUTPUT: samples.outputs}
            return samples.tensors | shared | answers | {"steps": samples.steps}

        stored = dict(self.kept(stage, tensors))
        steps, outputs = stored.pop("steps"), stored.pop(OUTPUT, None)
        shared = {name.removeprefix(SHARED): stored.pop(name) for name in list(stored) if name.startswith(SHARED)}
        return CalibrationSet(stored, steps, shared, outputs)

    def kept(self, stage: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What a stage of sampling computes, from the cache if it was finished before."""
        kept = self.cache or self.workspace
        stored = kept.load(stage)
        if stored is None:
            stored = compute()
            kept.save(stage, stored)
        return stored

    def dense_and_diverse_steps(self, diversity_weight: float) -> Tensor:
        """The steps that EDA-DM's TDAC selects for the calibration samples: int64 [N]; kept in the workspace."""
        stage = f"steps-{digest([self.key, diversity_weight])[:16]}"
        stored = self.workspace.load(stage)
        if stored is not None:
            return stored["steps"]
        check_enough(self.calibration.samples, self.request.steps)  # before the images are drawn
        images = min(self.calibration.images, FEATURE_IMAGES)
        middle = self.denoiser.get_submodule(self.description.middle)
        seed = self.seed + NOISE_OFFSET
        features = step_features(self.pipeline, self.denoiser, middle, self.request, images, seed, self.progress)
        steps = dense_and_diverse_steps(features, self.calibration.samples, self.generator(), diversity_weight)
        self.workspace.save(stage, {"steps": steps})
        return steps

    def instrument(
        self,
        weight_range: Range,
        *,
        split_skips: bool = False,
        timesteps: Tensor | None = None,
        rounding: type[RoundToNearest] = RoundToNearest,
    ) -> CalibrationModel:
        """A copy of the denoiser with quantizers.

        Args:
            split_skips: for a spec that leaves it to the recipe.
            timesteps: float [R], of the rows that activation tables get; None for static scales.
            rounding: rounds weights that are not learned, see `WeightPoint`.
        """
        spec = self.spec
        if spec.split_skips is None:
            spec = spec.model_copy(update={"split_skips": split_skips})
        calibrated = insert_fake_quantizers(
            self.reference,
            self.description,
            spec,
            timesteps=timesteps,
            weight_range=weight_range,
            progress=self.progress,
            ranks=self.workspace.ranks,
            rounding=rounding,
        )
        place(calibrated.model, self.description.blocks, self.device)
        return calibrated

    def calibrate_ranges(
        self,
        calibrated: CalibrationModel,
        samples: CalibrationSet,
        method: Range,
        *,
        per_row: bool = True,
        quantized_weights: bool = False,
    ) -> None:
        """Set all activation ranges from what the network does on the samples; see `calibrate_ranges`."""
        self._smooth_once(calibrated, samples)
        calibrate_ranges(
            calibrated,
            samples,
            method,
            self.chunk,
            self.progress,
            per_row=per_row,
            quantized_weights=quantized_weights,
            ranks=self.workspace.ranks,
        )

    def smoothing(self, calibrated: CalibrationModel, samples: CalibrationSet) -> None:
        """Smoothing the channels of every layer that gains by it (`calibration.smoothing`); kept in the workspace.

        Other stages do it first where the spec asks for it; a recipe that wants it by default calls this.
        """
        # The same samples are smoothed otherwise for other grids, which recipes choose.
        grids = {
            name: [_grid(layer.weight_point), layer.input_point and _grid(layer.input_point)]
            for name, layer in calibrated.layers.items()
        }
        stage = f"smoothing-{digest([self.key, tensors_digest(samples.tensors), grids])[:16]}"
        factors = self.workspace.load(stage)
        if factors is None:
            factors = find_smoothing(calibrated, samples, self.chunk, self.progress)
            self.workspace.save(stage, factors)
        for name, smoothing in factors.items():
            calibrated.layers[name].smooth(smoothing)

    def _smooth_once(self, calibrated: CalibrationModel, samples: CalibrationSet) -> None:
        if self.spec.smoothing and not any(
            layer.weight_point.smoothing is not None for layer in calibrated.layers.values()
        ):
            self.smoothing(calibrated, samples)

    def rank_layers(self, calibrated: CalibrationModel, samples: CalibrationSet, how: How) -> Sensitivity:
        """The error that each layer causes (`calibration.sensitivity`); layers measured are kept in the workspace.

        Args:
            calibrated: its ranges are found; it comes back with every quantizer switched on.
        """
        stage = digest([self.key, tensors_digest(samples.tensors), tensors_digest(calibrated.state())])
        return measure(
            calibrated,
            self.description.blocks,
            samples,
            how,
            batch_size=self.chunk,
            workspace=self.workspace,
            stage=f"sensitivity-{stage[:16]}",
            progress=self.progress,
        )

    def within_budget(self, budget: float) -> QuantSpec:
        """The job's spec with 8 bits for the layers that suffer most, within mean weight bits of `budget`."""
        ranking = self.rank_untrained("alone")
        spec = within_budget(self.spec, ranking, budget)
        kept = len(spec.overrides) - len(self.spec.overrides)
        self.progress.note(f"{kept} of {len(ranking.bits)} layers keep 8 bits within {budget:g} bits a weight.")
        return spec

    def rank_untrained(self, how: How, samples: int = RANKING_SAMPLES) -> Sensitivity:
        """The ranking before anything is learned: weights rounded to nearest, one static range an activation.

        Args:
            samples: for this ranking alone: the order of layers needs fewer than their ranges do.
        """
        calibration = self.calibration.model_copy(update={"samples": samples, "trajectories": RANKING_TRAJECTORIES})
        job = replace(self, calibration=calibration)
        stage = f"ranking-{digest([job.key, how])[:16]}"
        kept = self.workspace.load(stage)
        if kept is None:
            collected = job.collect(uniform_steps(samples, job.request.steps, job.generator()))
            calibrated = job.instrument("least-error", split_skips=True)
            job.calibrate_ranges(calibrated, collected, "least-error")
            ranking = job.rank_layers(calibrated, collected, how)
            kept = {"steps": torch.tensor(ranking.steps), "errors": ranking.errors, "whole": ranking.whole}
            self.workspace.save(stage, kept)
        bits = self.description.quantized_bits(self.spec)
        ends = tuple((first, last) for first, last in kept["steps"].tolist())
        return Sensitivity(how, bits, weight_sizes(self.denoiser, bits), ends, kept["errors"], kept["whole"])

    def correction(self, calibrated: CalibrationModel) -> Correction:
        """How the error of a finished quantization follows the output, by step (`calibration.correction`).

        Measured on trajectories of their own: weights are fitted to the calibration samples, and err less there.
        """
        job = replace(self, seed=self.seed + CORRECTION_OFFSET)
        samples = job.collect(uniform_steps(self.calibration.samples, self.request.steps, job.generator()))
        batch_size = self.chunk
        return estimate_correction(self.reference, calibrated, samples, batch_size, self.progress)

    def training_timesteps(self) -> Tensor:
        """Every timestep that the model was trained at, as the denoiser is given it: float [T]."""
        steps = int(self.pipeline.scheduler.config.num_train_timesteps)
        return torch.arange(steps).float() * self.description.time_unit

    def needs_the_whole(self, what: str) -> None:
        """Raise `StepquantError` if only one block at a time is where `what` has to compute."""
        if self.device is not None:
            raise StepquantError(
                f"{what} learns through the whole network at once, which cannot be done block by block on "
                f"{self.device}: move the pipeline there and leave the device out, or take a recipe that goes block by "
                "block (minmax, ptq4dm, q-diffusion, pqd, tdq, eda-dm)."
            )

    def finetune(self, calibrated: CalibrationModel, samples: CalibrationSet, settings: Finetuning) -> None:
        """Train weights and scales network-wise against the full-precision denoiser; kept in the workspace."""
        self.needs_the_whole("finetuning")
        finetune(
            self.reference,
            calibrated,
            samples,
            settings,
            workspace=self.workspace,
            key=digest([self.key, tensors_digest(samples.tensors)]),
            seed=self.seed,
            progress=self.progress,
        )

    def reconstruct(self, calibrated: CalibrationModel, samples: CalibrationSet, settings: Settings) -> None:
        """Learn rounding and activation scales block by block; finished blocks are kept in the workspace."""
        self._smooth_once(calibrated, samples)
        reconstruct(
            self.reference,
            calibrated,
            self.description.blocks,
            samples,
            settings,
            workspace=self.workspace,
            key=digest([self.key, tensors_digest(samples.tensors), tensors_digest(calibrated.state())]),
            seed=self.seed,
            batch_size=self.chunk,
            progress=self.progress,
        )


def _grid(point: ActivationPoint | WeightPoint) -> list[Any]:
    """What the smoothing of a layer depends on in its input or weight."""
    if isinstance(point, ActivationPoint):
        return [point.bits, list(point.layout.group_sizes)]
    return [point.rounding.__qualname__, point.bits, list(point.group_sizes)]


def _weights_digest(model: nn.Module) -> str:
    """Of a model's weights; those that are on no device, or packed by another library, are left out."""
    tensors = model.state_dict().items()
    return tensors_digest({name: tensor for name, tensor in tensors if type(tensor) is Tensor and not tensor.is_meta})


Recipe = Callable[..., CalibrationModel]
"""``recipe(job, **hyperparameters)``: returns the denoiser's copy with everything settled."""
