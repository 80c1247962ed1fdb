"""Calibration samples: what the denoiser is fed while the full-precision pipeline draws pictures."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from stepquant.errors import StepquantError
from stepquant.models.description import main_tensor
from stepquant.pipelines import Request, draw
from stepquant.progress import Progress

NOISE_OFFSET = 1_000_000_000
"""Added to the seed of calibration pictures, so that none starts from the noise of a picture that is evaluated."""

COLLECTING = "Collecting calibration samples"
"""What `collect` calls itself in front of a `Progress`."""

OUTPUT = "-> output"
"""What the denoiser answered, among its recorded arguments: no argument can have that name."""


class Calibration(BaseModel):
    """How calibration samples are collected.

    Attributes:
        samples: inputs of the denoiser to keep.
        steps: denoising steps of the trajectories they come from.
        trajectories: pictures drawn for it; None means up to 64, and never more than samples.
        batch_size: pictures drawn at a time, and samples passed through the model at a time.
        size: height and width of the pictures in pixels; None means the model's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: PositiveInt = 256
    steps: PositiveInt = 50
    trajectories: PositiveInt | None = None
    batch_size: PositiveInt = 16
    size: PositiveInt | None = None

    @property
    def pictures(self) -> int:
        return min(self.samples, self.trajectories or 64)


@dataclass(frozen=True)
class CalibrationSet:
    """Inputs of the denoiser, one a sample.

    Attributes:
        tensors: argument name -> [N, ...]; ``timestep`` is among them; a dotted name is an entry of a dictionary
            argument (``added_cond_kwargs.time_ids``) or, with a number, of a list. Arguments that are no tensors stay
            at their defaults.
        steps: int64 [N], the sampler's step that each sample was seen at.
        shared: argument name -> a tensor that all samples have in common, such as the positions of tokens.
        outputs: float [N, ...], what the denoiser answered, if that was collected.
    """

    tensors: dict[str, Tensor]
    steps: Tensor
    shared: dict[str, Tensor] = field(default_factory=dict)
    outputs: Tensor | None = None

    def __len__(self) -> int:
        return self.steps.shape[0]

    def first(self, count: int) -> CalibrationSet:
        """The first `count` samples, or all if there are no more."""
        tensors = {name: tensor[:count] for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, steps=self.steps[:count])

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
) -> CalibrationSet:
    """Run the pipeline and keep what the denoiser sees at the wanted steps.

    Sample i comes from trajectory ``i mod pictures`` at its step. Where the pipeline runs conditional and
    unconditional halves in one batch, or calls the denoiser once for each, samples alternate between the two.

    Args:
        steps: int64 [N], the wanted step of each sample, from `calibration.selection`.
        outputs: keep what the denoiser answers, too.

    Raises:
        StepquantError: if the sampler takes fewer calls than the steps asked for.
    """
    pictures = calibration.pictures
    rows: list[dict[str, Tensor]] = [{} for _ in range(len(steps))]
    with progress.task(COLLECTING, pictures * request.steps) as advance:
        for start in range(0, pictures, calibration.batch_size):
            indices = range(start, min(start + calibration.batch_size, pictures))
            wanted: dict[int, list[int]] = defaultdict(list)
            for sample, step in enumerate(steps.tolist()):
                if sample % pictures in indices:
                    wanted[step].append(sample)
            recorder = _Recorder(denoiser, wanted, start, pictures, len(indices), rows)
            try:
                draw(
                    pipeline,
                    request,
                    indices,
                    seed + NOISE_OFFSET,
                    decode=False,
                    on_step=partial(advance, len(indices)),
                )
            finally:
                recorder.remove()
    missing = [sample for sample, row in enumerate(rows) if not row]
    if missing:
        raise StepquantError(
            f"{len(missing)} calibration samples were never seen: the sampler took fewer than {request.steps} steps; "
            "ask for fewer steps."
        )
    tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    answered = tensors.pop(OUTPUT)
    return CalibrationSet(tensors, steps, recorder.shared, answered if outputs else None)


def collect_all(
    pipeline: Any,
    denoiser: nn.Module,
    request: Request,
    calibration: Calibration,
    seed: int,
    progress: Progress,
) -> CalibrationSet:
    """Every input and output of the denoiser along whole trajectories, for distillation.

    The sampler's timesteps depend on how many steps it takes, so each batch of trajectories takes another number, from
    half to twice those of `request`: together they visit far more timesteps than one of them.

    Args:
        calibration: `pictures` are drawn, `batch_size` at a time.
    """
    count, most = calibration.pictures, int(pipeline.scheduler.config.num_train_timesteps)
    starts = range(0, count, calibration.batch_size)
    fewest = max(1, request.steps // 2)
    choose = torch.Generator().manual_seed(seed)
    numbers = torch.randint(fewest, min(2 * request.steps, most) + 1, (len(starts),), generator=choose).tolist()
    parts = []
    with progress.task("Drawing trajectories", count) as advance:
        for start, number in zip(starts, numbers, strict=True):
            pictures = min(calibration.batch_size, count - start)
            steps = torch.arange(number).repeat_interleave(pictures)
            batch = Calibration(samples=len(steps), steps=number, trajectories=pictures, batch_size=pictures)
            conditions = request.conditions[start % max(1, len(request.conditions)) :] + request.conditions
            these = replace(request, conditions=conditions, steps=number)
            parts.append(collect(pipeline, denoiser, these, steps, batch, seed + start, Progress(), outputs=True))
            advance(pictures)
    tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
    outputs = torch.cat([part.outputs for part in parts if part.outputs is not None])
    return CalibrationSet(tensors, torch.cat([part.steps for part in parts]), parts[0].shared, outputs)


class _Recorder:
    """A hook on the denoiser that copies the wanted rows of its arguments and its output.

    Steps are counted by changes of timestep.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        wanted: dict[int, list[int]],
        start: int,
        pictures: int,
        batch: int,
        rows: list[dict[str, Tensor]],
    ) -> None:
        self.signature = inspect.signature(denoiser.forward)
        self.wanted, self.start, self.pictures, self.batch = wanted, start, pictures, batch
        self.rows = rows
        self.shared: dict[str, Tensor] = {}
        self.step = -1
        self.time: float | None = None
        self.calls = 0
        self.remove = denoiser.register_forward_hook(self._read, with_kwargs=True).remove

    def _read(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        arguments = self.signature.bind(*args, **kwargs).arguments
        sample = next(value for value in arguments.values() if isinstance(value, Tensor))
        time = torch.as_tensor(arguments["timestep"]).reshape(-1)
        if self.time is None or float(time[0]) != self.time:
            self.step, self.time, self.calls = self.step + 1, float(time[0]), 0
        self.calls += 1
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
        halves = sample.shape[0] // self.batch
        for wanted in self.wanted.get(self.step, ()):
            turn = wanted + wanted // self.pictures
            if turn % self.calls != self.calls - 1:
                continue  # an earlier call of this step is this sample's
            half = turn % halves
            row = half * self.batch + wanted % self.pictures - self.start
            self.rows[wanted].update({name: value[row].detach().clone() for name, value in per_sample.items()})


def flatten(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """An argument as named values: itself, or the entries of a dictionary or list under dotted names."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield f"{name}.{key}", entry
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield f"{name}.{index}", entry
    else:
        yield name, value


def nest(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments from flat names, the inverse of `flatten`."""
    arguments: dict[str, Any] = {}
    for name, tensor in tensors.items():
        outer, _, inner = name.partition(".")
        if inner.isdigit():
            arguments[outer] = [*arguments.get(outer, []), tensor]
        else:
            arguments[outer] = {**arguments.get(outer, {}), inner: tensor} if inner else tensor
    return arguments
