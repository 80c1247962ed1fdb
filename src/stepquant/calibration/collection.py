"""Collect calibration samples: the denoiser's inputs while the full-precision pipeline generates images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepquant.calibration.buckets import Bucket, Shared
from stepquant.calibration.samples import Calibration, CalibrationSet, join
from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.files import allocate, remove, tensors_digest
from stepquant.layers.clock import TimestepReader
from stepquant.models import chunk_size
from stepquant.pipelines.generate import batches, generate
from stepquant.pipelines.layout import pack, samples_in, with_unseen
from stepquant.pipelines.recording import CallPattern, RecordedCall, observe_calls, on_call, pattern_of_call
from stepquant.pipelines.request import Request
from stepquant.pipelines.schedule import most_steps
from stepquant.pipelines.share import own_steps
from stepquant.pipelines.steps import StepCounter
from stepquant.progress import Progress
from stepquant.workspace import Workspace

NOISE_OFFSET = 1_000_000_000
"""Added to the seed of calibration images, so that none starts from the noise of an evaluated image."""

COLLECTING = "Collecting calibration samples"
"""Description of the progress of `collect`."""


def collect(
    pipeline: Any,
    denoiser: nn.Module,
    request: Request,
    steps: Tensor,
    calibration: Calibration,
    seed: int,
    progress: Progress,
    *,
    pattern: CallPattern | None = None,
    outputs: bool = False,
    workspace: Workspace | None = None,
    cache: Workspace | None = None,
    stage: str = "samples",
) -> CalibrationSet:
    """Run the pipeline and record the denoiser's inputs at the given steps.

    Sample i comes from trajectory ``i mod images`` at its step. With guidance, in one
    batch or in two calls, samples alternate between the conditional and the unconditional pass. A pair of step and
    trajectory may occur more than once.

    Args:
        steps: int64 [N], the step of each sample, from `calibration.selection`.
        pattern: of the denoiser's calls; by default it is observed where any has to be recorded.
        outputs: record the denoiser's outputs, too.
        workspace: stores the samples of every few finished trajectories, shares the trajectories among its processes,
            and holds the whole set in memory-mapped files; None: everything stays in memory.
        cache: stores the finished samples instead of the workspace.
        stage: name of the stored samples.

    Raises:
        StepquantError: if the sampler takes fewer steps than requested.
    """
    images = calibration.images
    parts = batches(images, chunk_size(denoiser))
    scratch = None if workspace is None else workspace.scratch(stage)
    store = cache or workspace
    sets: list[CalibrationSet] = []

    def recorded(indices: range) -> dict[str, Tensor]:
        each = [range(index, index + 1) for index in indices] if observed.one_at_a_time else [indices]
        return join([record(part) for part in each]).to_tensors()

    def record(indices: range) -> CalibrationSet:
        conditions = len(request.conditions) or 1
        recorder = _Recorder(denoiser, observed, steps, indices, images, conditions, outputs=outputs)
        try:
            on_step = partial(advance, len(indices))
            noise = seed + NOISE_OFFSET
            generate(pipeline, request, indices, noise, decode=False, on_step=on_step, split=False)
        finally:
            recorder.remove()
        return recorder.samples(request.steps)

    def keep(samples: dict[str, Tensor]) -> None:
        if scratch is not None:
            files = (scratch / f"{len(sets)}-{index}.part" for index in range(len(samples)))
            samples = {name: _mapped(tensor, next(files)) for name, tensor in samples.items()}
        sets.append(CalibrationSet.from_tensors(samples))

    def name_of(indices: range) -> str:
        return f"{stage}-{indices.start:06d}"

    with progress.task(COLLECTING, images * request.steps) as advance:
        missing = []
        for indices in parts:
            stored = None if store is None else store.load(name_of(indices))
            if stored is None:
                missing.append(indices)
            else:
                keep(stored)
                advance(len(indices) * request.steps)
        if missing:
            observed = pattern or observe_calls(pipeline, denoiser, request, seed + NOISE_OFFSET)
        ranks = Ranks() if workspace is None else workspace.ranks
        for indices, samples in zip(missing, ranks.map(recorded, missing), strict=True):
            if store is not None:
                store.save(name_of(indices), samples)
            keep(samples)
    whole = join(sets, scratch)
    for path in () if scratch is None else scratch.glob("*.part"):
        remove(path)
    return whole


def _mapped(tensor: Tensor, path: Path) -> Tensor:
    """A copy in a file that is mapped into memory."""
    return allocate(path, tensor.shape, tensor.dtype).copy_(tensor)


def collect_all(
    pipeline: Any,
    denoiser: nn.Module,
    request: Request,
    calibration: Calibration,
    seed: int,
    progress: Progress,
    component: str | None = None,
) -> CalibrationSet:
    """Record every input and output of the denoiser along whole trajectories, for distillation.

    The sampler's timesteps depend on the number of steps, so each batch of trajectories takes a random number, from
    half to twice that of `request`: together they visit many more timesteps.

    Args:
        calibration: its `images` is the number of trajectories.
        component: name of the denoiser in the pipeline, if it may take part in some of the steps only.
    """
    count = calibration.images
    most = most_steps(getattr(pipeline, "scheduler", None)) or 2 * request.steps
    chunk = chunk_size(denoiser)
    starts = range(0, count, chunk)
    fewest = max(1, request.steps // 2)
    choose = torch.Generator().manual_seed(seed)
    numbers = torch.randint(fewest, min(2 * request.steps, most) + 1, (len(starts),), generator=choose).tolist()
    pattern = observe_calls(pipeline, denoiser, request, seed + NOISE_OFFSET)
    parts: list[CalibrationSet] = []
    with progress.task("Generating trajectories", count) as advance:
        for start, number in zip(starts, numbers, strict=True):
            images = min(chunk, count - start)
            visited = number if component is None else own_steps(pipeline, component, replace(request, steps=number))
            steps = torch.arange(visited).repeat_interleave(images)
            batch = Calibration(samples=len(steps), steps=number, trajectories=images)
            conditions = request.conditions[start % max(1, len(request.conditions)) :] + request.conditions
            these = replace(request, conditions=conditions, steps=number)
            part = collect(
                pipeline, denoiser, these, steps, batch, seed + start, Progress(), pattern=pattern, outputs=True
            )
            parts.append(replace(part, numbers=part.numbers + sum(map(len, parts))))
            advance(images)
    return join(parts)


class _Recorder:
    """Copies the wanted samples of each call of the denoiser."""

    def __init__(
        self,
        denoiser: nn.Module,
        pattern: CallPattern,
        steps: Tensor,
        indices: range,
        images: int,
        conditions: int,
        *,
        outputs: bool,
    ) -> None:
        self.pattern, self.indices, self.images, self.outputs = pattern, indices, images, outputs
        self.conditions = conditions if len(steps) <= images else None
        self.wanted: dict[int, list[int]] = defaultdict(list)
        for sample, step in enumerate(steps.tolist()):
            if sample % images in indices:
                self.wanted[step].append(sample)
        self.recorded: dict[int, tuple[Bucket, float, int]] = {}
        self.shared: dict[str, Tensor] = {}
        self.count = StepCounter()
        self.remove = on_call(denoiser, self._read)

    def samples(self, steps: int) -> CalibrationSet:
        """The recorded samples."""
        wanted = sorted(sample for samples in self.wanted.values() for sample in samples)
        missing = [sample for sample in wanted if sample not in self.recorded]
        if missing:
            raise StepquantError(
                f"{len(missing)} calibration samples were not recorded: the sampler took fewer than {steps} steps. "
                "Use fewer calibration steps."
            )
        recorded = [self.recorded[sample] for sample in wanted]
        sets = [
            CalibrationSet((bucket,), torch.tensor([time]), torch.tensor([step]), torch.tensor([sample]), {})
            for sample, (bucket, time, step) in zip(wanted, recorded, strict=True)
        ]
        return replace(join(sets), shared=self.shared)

    def _read(self, arguments: dict[str, Any], output: Any) -> None:
        arguments = self.pattern.completed(arguments, output if self.outputs else None)
        self.count.see(arguments[self.pattern.timestep])
        batch = len(self.indices)
        pattern = replace(self.pattern, layout=with_unseen(self.pattern.layout, arguments))
        halves = samples_in(self.pattern.layout, arguments) // batch
        constants: dict[str, Any] = {}

        def constant(path: str, part: Any) -> Any:
            if path not in constants:
                constants[path] = shared_part(part, self.shared)
            return constants[path]

        for wanted in self.wanted.get(self.count.step, ()):
            turn = self._turn(wanted)
            if turn % self.count.calls != self.count.calls - 1:
                continue  # an earlier call of this step is this sample's
            row = turn % halves * batch + wanted % self.images - self.indices.start
            bucket, time = take_sample(pattern, arguments, row, constant)
            self.recorded[wanted] = bucket, time, self.count.step

    def _turn(self, sample: int) -> int:
        """Number whose remainder chooses the pass of guidance that a sample comes from.

        Passes alternate between the samples, and between those of one image; where each image gives one sample, between
        those of one condition, as an even number of conditions would otherwise meet the same pass every time.
        """
        if self.conditions is None:
            return sample + sample // self.images
        return sample % self.conditions + sample // self.conditions


def samples_of_calls(denoiser: nn.Module, calls: Iterable[RecordedCall | Mapping[str, Any]]) -> CalibrationSet:
    """Samples of calls that were recorded elsewhere, each with any number of samples.

    Args:
        calls: arguments by name; the first tensor, or list of tensors, holds the noisy samples along dimension 0.

    Raises:
        StepquantError: if there are no calls, one has no timestep, or the parts of each sample cannot be found.
    """
    timestep = TimestepReader.of(denoiser).name
    pattern: CallPattern | None = None
    shared: dict[str, Tensor] = {}
    taken: list[tuple[Bucket, float]] = []
    for call in calls:
        given = call.arguments if isinstance(call, RecordedCall) else call
        arguments = {name: value for name, value in given.items() if name != "return_dict"}
        if timestep not in arguments:
            raise StepquantError(
                f"a call has the arguments {', '.join(arguments) or 'none'}; expected one named {timestep}. Record the "
                "arguments by name."
            )
        pattern = pattern or pattern_of_call(denoiser, arguments)
        complete = pattern.completed(arguments)
        for row in range(samples_in(pattern.layout, complete)):
            taken.append(take_sample(pattern, complete, row, lambda _path, part: shared_part(part, shared)))
    if not taken:
        raise StepquantError("calls is empty; expected the arguments of at least one call of the denoiser.")
    latest_first = sorted({time for _, time in taken}, reverse=True)
    sets = [
        CalibrationSet(
            (bucket,), torch.tensor([time]), torch.tensor([latest_first.index(time)]), torch.tensor([number]), {}
        )
        for number, (bucket, time) in enumerate(taken)
    ]
    return replace(join(sets), shared=shared)


def take_sample(
    pattern: CallPattern, arguments: dict[str, Any], row: int, constant: Callable[[str, Any], Any]
) -> tuple[Bucket, float]:
    """One sample of a call as a bucket, and its timestep; see `stepquant.pipelines.layout.pack`."""
    template, parts = pack(arguments, pattern.layout, [row], constant)
    tensors = {name: in_float32(tensor.detach()).clone() for name, tensor in parts.items()}
    time = float(torch.as_tensor(tensors.get(pattern.timestep, arguments[pattern.timestep])).max())
    return Bucket(template, tensors, time if pattern.same_time else None), time


def shared_part(part: Any, shared: dict[str, Tensor]) -> Any:
    """What stands in a template for an argument that all samples share; a tensor is added to `shared`."""
    if not isinstance(part, Tensor):
        return part.item() if isinstance(part, np.generic) else part
    tensor = in_float32(part.detach().cpu()).clone()
    key = tensors_digest({"": tensor})[:16]
    shared.setdefault(key, tensor)
    return Shared(key)


def in_float32(tensor: Tensor) -> Tensor:
    """Samples of a pipeline in half precision are converted to float32."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
