"""Calibration samples: the denoiser's inputs while the full-precision pipeline generates images."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from stepquant.config import Checked
from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.files import allocate
from stepquant.models import chunk_size
from stepquant.models.description import main_tensor
from stepquant.pipelines.arguments import flatten, nest
from stepquant.pipelines.generate import batches, generate
from stepquant.pipelines.request import Request
from stepquant.pipelines.steps import StepCounter
from stepquant.progress import Progress
from stepquant.workspace import Workspace

NOISE_OFFSET = 1_000_000_000
"""Added to the seed of calibration images, so that none starts from the noise of an evaluated image."""

COLLECTING = "Collecting calibration samples"
"""Description of the progress of `collect`."""

OUTPUT = "-> output"
"""Name of the denoiser's output among its recorded arguments; not a valid argument name."""

INDEX = "index"
"""Name of the sample numbers, int64 [n], among recorded arguments; no denoiser has an argument of this name."""
SHARED = "shared:"
"""Prefix of the names of arguments that all samples share."""


class Calibration(Checked):
    """How calibration samples are collected.

    Attributes:
        samples: number of denoiser inputs.
        steps: denoising steps of the trajectories.
        trajectories: number of images generated; None means up to 64, and never more than samples.
        size: height and width of the images in pixels; None means the model's default.
    """

    called = "calibration"

    samples: PositiveInt = 256
    steps: PositiveInt = 50
    trajectories: PositiveInt | None = None
    size: PositiveInt | None = None

    @classmethod
    def parse(cls, calibration: Calibration | dict[str, Any] | None) -> Calibration:
        """Accept a `Calibration`, a dictionary of the attributes above, or None for the defaults.

        Raises:
            StepquantError: for an unknown attribute or an invalid value.
        """
        return cls.model_validate({} if calibration is None else calibration)

    @property
    def images(self) -> int:
        return min(self.samples, self.trajectories or 64)


@dataclass(frozen=True)
class CalibrationSet:
    """Inputs of the denoiser, one per sample.

    Attributes:
        tensors: argument name -> [N, ...]; ``timestep`` is among them; a dotted name is an entry of a dictionary
            argument (``added_cond_kwargs.time_ids``) or, with a number, of a list. Arguments other than tensors
            keep their defaults.
        steps: int64 [N], the sampler's step that each sample was seen at.
        shared: argument name -> a tensor that all samples share, such as the positions of tokens.
        outputs: float [N, ...], of the denoiser, if they were collected.
    """

    tensors: dict[str, Tensor]
    steps: Tensor
    shared: dict[str, Tensor] = field(default_factory=dict)
    outputs: Tensor | None = None

    def __len__(self) -> int:
        return self.steps.shape[0]

    def first(self, count: int) -> CalibrationSet:
        """The first `count` samples, at most all."""
        tensors = {name: tensor[:count] for name, tensor in self.tensors.items()}
        outputs = None if self.outputs is None else self.outputs[:count]
        return replace(self, tensors=tensors, steps=self.steps[:count], outputs=outputs)

    def arguments(self, chosen: slice | Tensor) -> dict[str, Any]:
        """Keyword arguments of the denoiser for some of the samples."""
        return nest({name: tensor[chosen] for name, tensor in self.tensors.items()} | self.shared)

    def batches(self, size: int) -> Iterator[slice]:
        """Slices that cover all samples in order."""
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))


def collect(
    pipeline: Any,
    denoiser: nn.Module,
    request: Request,
    steps: Tensor,
    calibration: Calibration,
    seed: int,
    progress: Progress,
    *,
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
    memory: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    scratch = None if workspace is None else workspace.scratch(stage)
    store = cache or workspace

    def recorded(indices: range) -> dict[str, Tensor]:
        recorder = _Recorder(denoiser, steps, indices, images)
        try:
            on_step = partial(advance, len(indices))
            generate(pipeline, request, indices, seed + NOISE_OFFSET, decode=False, on_step=on_step)
        finally:
            recorder.remove()
        samples = recorder.samples(request.steps)
        return samples if outputs else {name: tensor for name, tensor in samples.items() if name != OUTPUT}

    def keep(samples: dict[str, Tensor]) -> None:
        chosen = samples.pop(INDEX)
        for name, part in samples.items():
            if name.startswith(SHARED):
                shared[name.removeprefix(SHARED)] = part
                continue
            if name not in memory:
                shape = (len(steps), *part.shape[1:])
                path = None if scratch is None else scratch / f"{len(memory)}.bin"
                memory[name] = allocate(path, shape, part.dtype)
            memory[name][chosen] = part

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
        ranks = Ranks() if workspace is None else workspace.ranks
        for indices, samples in zip(missing, ranks.map(recorded, missing), strict=True):
            if store is not None:
                store.save(name_of(indices), samples)
            keep(samples)
    collected = memory.pop(OUTPUT, None)
    return CalibrationSet(memory, steps, shared, collected)


def collect_all(
    pipeline: Any,
    denoiser: nn.Module,
    request: Request,
    calibration: Calibration,
    seed: int,
    progress: Progress,
) -> CalibrationSet:
    """Record every input and output of the denoiser along whole trajectories, for distillation.

    The sampler's timesteps depend on the number of steps, so each batch of trajectories takes a random number, from
    half to twice that of `request`: together they visit many more timesteps.

    Args:
        calibration: its `images` is the number of trajectories.
    """
    count, most = calibration.images, int(pipeline.scheduler.config.num_train_timesteps)
    chunk = chunk_size(denoiser)
    starts = range(0, count, chunk)
    fewest = max(1, request.steps // 2)
    choose = torch.Generator().manual_seed(seed)
    numbers = torch.randint(fewest, min(2 * request.steps, most) + 1, (len(starts),), generator=choose).tolist()
    parts = []
    with progress.task("Generating trajectories", count) as advance:
        for start, number in zip(starts, numbers, strict=True):
            images = min(chunk, count - start)
            steps = torch.arange(number).repeat_interleave(images)
            batch = Calibration(samples=len(steps), steps=number, trajectories=images)
            conditions = request.conditions[start % max(1, len(request.conditions)) :] + request.conditions
            these = replace(request, conditions=conditions, steps=number)
            parts.append(collect(pipeline, denoiser, these, steps, batch, seed + start, Progress(), outputs=True))
            advance(images)
    tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
    outputs = torch.cat([part.outputs for part in parts if part.outputs is not None])
    return CalibrationSet(tensors, torch.cat([part.steps for part in parts]), parts[0].shared, outputs)


class _Recorder:
    """A hook on the denoiser that copies the requested rows of its arguments and its output."""

    def __init__(self, denoiser: nn.Module, steps: Tensor, indices: range, images: int) -> None:
        self.signature = inspect.signature(denoiser.forward)
        self.indices, self.images = indices, images
        self.wanted: dict[int, list[int]] = defaultdict(list)
        for sample, step in enumerate(steps.tolist()):
            if sample % images in indices:
                self.wanted[step].append(sample)
        self.rows: dict[int, dict[str, Tensor]] = defaultdict(dict)
        self.shared: dict[str, Tensor] = {}
        self.count = StepCounter()
        self.remove = denoiser.register_forward_hook(self._read, with_kwargs=True).remove

    def samples(self, steps: int) -> dict[str, Tensor]:
        """The recorded rows, argument name -> [n, ...]; shared arguments, prefixed by `SHARED`; and the `INDEX`."""
        wanted = sorted(sample for samples in self.wanted.values() for sample in samples)
        missing = [sample for sample in wanted if sample not in self.rows]
        if missing:
            raise StepquantError(
                f"{len(missing)} calibration samples were not recorded: the sampler took fewer than {steps} steps. "
                "Use fewer calibration steps."
            )
        names = self.rows[wanted[0]] if wanted else ()
        rows = {name: _widened(torch.stack([self.rows[sample][name] for sample in wanted]).cpu()) for name in names}
        shared = {f"{SHARED}{name}": _widened(tensor.cpu()) for name, tensor in self.shared.items()}
        return rows | shared | {INDEX: torch.tensor(wanted)}

    def _read(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        arguments = self.signature.bind(*args, **kwargs).arguments
        sample = next(value for value in arguments.values() if isinstance(value, Tensor))
        time = torch.as_tensor(arguments["timestep"]).reshape(-1)
        self.count.see(time)
        arguments["timestep"] = time.expand(sample.shape[0]) if time.numel() == 1 else time
        flat = {name: value for key, value in arguments.items() for name, value in flatten(key, value)}
        flat[OUTPUT] = main_tensor(output)
        per_sample = {
            name: value
            for name, value in flat.items()
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == sample.shape[0]
        }
        others = {name: value for name, value in flat.items() if isinstance(value, Tensor) and name not in per_sample}
        self.shared = {name: value.detach().clone() for name, value in others.items()}
        batch = len(self.indices)
        halves = sample.shape[0] // batch
        for wanted in self.wanted.get(self.count.step, ()):
            turn = wanted + wanted // self.images
            if turn % self.count.calls != self.count.calls - 1:
                continue  # an earlier call of this step is this sample's
            half = turn % halves
            row = half * batch + wanted % self.images - self.indices.start
            self.rows[wanted].update({name: value[row].detach().clone() for name, value in per_sample.items()})


def _widened(tensor: Tensor) -> Tensor:
    """Samples of a pipeline in half precision are converted to float32."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
