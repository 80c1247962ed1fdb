"""Calibration samples: inputs of a denoiser, with any structure of arguments."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor

from stepquant.calibration.buckets import Bucket, Ranges, Shared, decoded, encoded, join_buckets
from stepquant.config import Checked
from stepquant.files import cannot_write
from stepquant.models.description import main_tensor
from stepquant.pipelines.layout import Rows, Stored, unpack
from stepquant.pipelines.recording import OUTPUT


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
    """N inputs of a denoiser. A batch never mixes buckets, in which they lie one bucket after the other.

    Attributes:
        buckets: samples whose arguments have the same structure; of most models, all of them.
        timesteps: float32 [N], of each sample, as the denoiser is given it.
        steps: int64 [N], the sampler's step that each sample was seen at.
        numbers: int64 [N], of the samples in the order of collecting; ascending within a bucket.
        shared: key -> a tensor that samples share, such as the positions of tokens.
    """

    buckets: tuple[Bucket, ...]
    timesteps: Tensor
    steps: Tensor
    numbers: Tensor
    shared: dict[str, Tensor]

    @classmethod
    def of(cls, arguments: dict[str, Tensor], steps: Tensor, timestep: str = "timestep") -> CalibrationSet:
        """Samples whose arguments are tensors [N, ...] each; `OUTPUT` may be among them."""
        bucket = Bucket({name: Stored(name, Rows()) for name in arguments}, arguments)
        return cls((bucket,), arguments[timestep].float(), steps, torch.arange(len(steps)), {})

    def __len__(self) -> int:
        return self.steps.shape[0]

    @cached_property
    def ranges(self) -> Ranges:
        """The buckets' ranges of samples."""
        return Ranges(tuple(map(len, self.buckets)))

    def times(self, timesteps: Tensor, steps: int) -> list[float]:
        """Normalized time (`stepquant.config.Steps`) of timesteps, float [R]: that of the nearest sample.

        Args:
            steps: number of the sampler's steps.
        """
        seen, index = self.timesteps.unique(return_inverse=True)
        step = torch.full(seen.shape, steps).scatter_reduce_(0, index, self.steps, "amin")
        nearest = (timesteps[:, None] - seen).abs().argmin(dim=1)
        return ((step[nearest] + 0.5) / steps).tolist()

    def first(self, count: int) -> CalibrationSet:
        """The first `count` samples that were collected, at most all."""
        if len(self.buckets) == 1:
            return self._part((self.buckets[0].at(slice(0, count)),), slice(0, count))
        return self.subset(self.numbers.argsort()[:count].sort().values)

    def subset(self, chosen: Tensor) -> CalibrationSet:
        """Some samples, int64 [n] ascending."""
        buckets = []
        for bucket, start in zip(self.buckets, self.ranges.starts, strict=False):
            inside = chosen[(start <= chosen) & (chosen < start + len(bucket))]
            if len(inside):
                buckets.append(bucket.at(inside - start))
        return self._part(tuple(buckets), chosen)

    def divided(self, groups: Tensor) -> CalibrationSet:
        """The same samples with each bucket divided by group, int64 [N]."""
        buckets, order = [], []
        for bucket, start in zip(self.buckets, self.ranges.starts, strict=False):
            inside = groups[start : start + len(bucket)]
            for group in inside.unique():
                chosen = (inside == group).nonzero().flatten()
                buckets.append(bucket.at(chosen))
                order.append(start + chosen)
        return self._part(tuple(buckets), torch.cat(order))

    def _part(self, buckets: tuple[Bucket, ...], chosen: slice | Tensor) -> CalibrationSet:
        rows = (self.timesteps[chosen], self.steps[chosen], self.numbers[chosen])
        return CalibrationSet(buckets, *rows, self.shared)

    def arguments(self, chosen: slice | Tensor) -> dict[str, Any]:
        """Keyword arguments of the denoiser for some samples of one bucket."""
        value = self._value(chosen)
        value.pop(OUTPUT, None)
        return value

    def outputs(self, chosen: slice | Tensor) -> Tensor:
        """The denoiser's outputs for some samples of one bucket, float [n, ...], if they were collected."""
        return main_tensor(self._value(chosen)[OUTPUT])

    def batches(self, size: int) -> Iterator[slice]:
        """Slices of at most `size` samples that cover all in order."""
        return self.ranges.batches(size)

    def minibatch(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        """Random samples of one bucket: int64 [size]."""
        return self.ranges.minibatch(size, generator)

    def _value(self, chosen: slice | Tensor) -> dict[str, Any]:
        index, inside = self.ranges.locate(chosen)
        bucket = self.buckets[index].at(inside)

        def constant(part: Any) -> Any:
            return self.shared[part.key] if isinstance(part, Shared) else part

        value: dict[str, Any] = unpack(bucket.template, bucket.tensors, len(bucket), constant)
        return value

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything as named tensors, to be stored; see `from_tensors`."""
        templates = json.dumps([[encoded(bucket.template), bucket.time] for bucket in self.buckets]).encode()
        own = {
            f"{index}/{name}": tensor
            for index, bucket in enumerate(self.buckets)
            for name, tensor in bucket.tensors.items()
        }
        shared = {f"shared/{key}": tensor for key, tensor in self.shared.items()}
        tables = {"timesteps": self.timesteps, "steps": self.steps, "numbers": self.numbers}
        return own | shared | tables | {"templates": torch.frombuffer(bytearray(templates), dtype=torch.uint8)}

    @classmethod
    def from_tensors(cls, stored: dict[str, Tensor]) -> CalibrationSet:
        """The inverse of `to_tensors`."""
        grouped: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for path, tensor in stored.items():
            group, _, name = path.partition("/")
            grouped[group][name] = tensor
        templates = json.loads(bytes(stored["templates"].tolist()))
        buckets = [Bucket(decoded(part), grouped[str(index)], time) for index, (part, time) in enumerate(templates)]
        return cls(tuple(buckets), stored["timesteps"], stored["steps"], stored["numbers"], grouped["shared"])


def join(sets: Sequence[CalibrationSet], folder: Path | None = None) -> CalibrationSet:
    """Sets as one, in which the samples of a bucket are in the order of their numbers.

    Args:
        folder: holds the result in files mapped into memory; None: in memory.
    """
    found: dict[str, list[tuple[Bucket, CalibrationSet, slice]]] = defaultdict(list)
    for samples in sets:
        for bucket, start in zip(samples.buckets, samples.ranges.starts, strict=False):
            found[bucket.key].append((bucket, samples, slice(start, start + len(bucket))))
    joined = [_join(parts, folder and folder / str(index)) for index, parts in enumerate(found.values())]
    joined.sort(key=lambda part: int(part.numbers[0]))
    timesteps, steps, numbers = (
        torch.cat([getattr(part, name) for part in joined]) for name in ("timesteps", "steps", "numbers")
    )
    shared = {key: tensor for samples in sets for key, tensor in samples.shared.items()}
    return CalibrationSet(tuple(part.buckets[0] for part in joined), timesteps, steps, numbers, shared)


def _join(parts: Sequence[tuple[Bucket, CalibrationSet, slice]], folder: Path | None) -> CalibrationSet:
    """Parts of one key as one bucket, without what they share."""
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from None
    order = torch.cat([samples.numbers[rows] for _, samples, rows in parts]).argsort()
    positions = order.argsort().split([len(bucket) for bucket, _, _ in parts])
    timesteps, steps, numbers = (
        torch.cat([getattr(samples, name)[rows] for _, samples, rows in parts])[order]
        for name in ("timesteps", "steps", "numbers")
    )
    bucket = join_buckets([bucket for bucket, _, _ in parts], positions, folder)
    return CalibrationSet((bucket,), timesteps, steps, numbers, {})
