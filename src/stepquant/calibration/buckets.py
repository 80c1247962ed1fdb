"""Samples whose arguments have the same structure lie in one bucket, where they can be stacked into a batch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepquant.errors import StepquantError
from stepquant.files import allocate
from stepquant.pipelines.layout import Listed, Multiple, Rows, Stored


@dataclass(frozen=True)
class Ranges:
    """Consecutive ranges of samples, one for each bucket.

    Attributes:
        sizes: number of samples in each.
    """

    sizes: tuple[int, ...]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        return tuple(accumulate(self.sizes, initial=0))

    def locate(self, chosen: slice | Tensor) -> tuple[int, slice | Tensor]:
        """The bucket that some samples lie in, and where they lie in it.

        Raises:
            ValueError: if they lie in several.
        """
        if len(self.sizes) == 1:
            return 0, chosen
        if isinstance(chosen, slice):
            first, end, _ = chosen.indices(self.starts[-1])
            last = end - 1
        else:
            first, last = (int(chosen.min()), int(chosen.max())) if len(chosen) else (0, 0)
        bucket = max(index for index, start in enumerate(self.starts[:-1]) if start <= first)
        start = self.starts[bucket]
        if last >= self.starts[bucket + 1]:
            raise ValueError(f"samples {first} to {last} lie in several buckets, which start at {self.starts[:-1]}")
        return bucket, slice(first - start, end - start) if isinstance(chosen, slice) else chosen - start

    def batches(self, size: int) -> Iterator[slice]:
        """Slices of at most `size` samples of one bucket that cover all samples in order."""
        for begin, end in zip(self.starts, self.starts[1:], strict=False):
            for start in range(begin, end, size):
                yield slice(start, min(start + size, end))

    def split(self, chosen: Tensor, size: int) -> Iterator[Tensor]:
        """Some samples in order, int64 [n], as parts of at most `size` samples of one bucket."""
        buckets = torch.bucketize(chosen, torch.tensor(self.starts[1:]), right=True)
        for part in chosen.tensor_split((buckets.diff() != 0).nonzero().flatten() + 1):
            yield from part.split(size)

    def minibatch(self, size: int, generator: torch.Generator | None = None) -> Tensor:
        """Random samples of one bucket, which is chosen by its share of the samples: int64 [size]."""
        begin, end = 0, self.starts[-1]
        if len(self.sizes) > 1:
            sample = int(torch.randint(end, (1,), generator=generator))
            bucket, _ = self.locate(slice(sample, sample + 1))
            begin, end = self.starts[bucket], self.starts[bucket + 1]
        return begin + torch.randint(end - begin, (size,), generator=generator)


@dataclass(frozen=True)
class Shared:
    """Stands in a template for a tensor that several buckets may share."""

    key: str


@dataclass(frozen=True)
class Bucket:
    """Samples with the same structure of arguments.

    Attributes:
        template: of the arguments, see `stepquant.pipelines.layout.pack`; plain values, and `Shared` for tensors.
        tensors: name -> [n, ...], the parts of each sample.
        time: timestep of all samples, in a model whose batches need a single one.
    """

    template: Any
    tensors: dict[str, Tensor]
    time: float | None = None

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @cached_property
    def key(self) -> str:
        """Equal for buckets that can be joined."""
        shapes = {name: [str(tensor.dtype), list(tensor.shape[1:])] for name, tensor in self.tensors.items()}
        return json.dumps([encoded(self.template), shapes, self.time])

    def at(self, chosen: slice | Tensor) -> Bucket:
        """Some of the samples."""
        return replace(self, tensors={name: tensor[chosen] for name, tensor in self.tensors.items()})


def encoded(template: Any) -> Any:
    """A template as JSON-able values, see `decoded`.

    Raises:
        StepquantError: for a value that is not a tensor, number, string, dtype or None, or a structure of those.
    """
    match template:
        case dict():
            return {"dict": [[key, encoded(part)] for key, part in template.items()]}
        case list():
            return {"list": [encoded(part) for part in template]}
        case tuple():
            return {"tuple": [encoded(part) for part in template]}
        case Shared(key):
            return {"shared": key}
        case Multiple(count):
            return {"multiple": count}
        case Stored(name, rows):
            return {"stored": [name, None if rows is None else [rows.dim, rows.count]]}
        case Listed(entries, is_tuple):
            return {"listed": [encoded(entries), is_tuple]}
        case torch.dtype():
            return {"dtype": str(template).removeprefix("torch.")}
        case None | bool() | int() | float() | str():
            return template
    raise StepquantError(
        f"the denoiser is called with an argument of type {type(template).__name__}, which cannot be stored; expected "
        "tensors, numbers, strings, None, and lists, tuples and dictionaries of them. Leave the argument out."
    )


def decoded(value: Any) -> Any:
    """The template that `encoded` made a value of."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "dict":
            return {key: decoded(part) for key, part in content}
        case "list":
            return [decoded(part) for part in content]
        case "tuple":
            return tuple(decoded(part) for part in content)
        case "shared":
            return Shared(content)
        case "multiple":
            return Multiple(content)
        case "stored":
            name, rows = content
            return Stored(name, None if rows is None else Rows(*rows))
        case "listed":
            return Listed(decoded(content[0]), content[1])
    return getattr(torch, content)


def join_buckets(buckets: Sequence[Bucket], positions: Sequence[Tensor], folder: Path | None = None) -> Bucket:
    """Buckets of the same key as one.

    Args:
        positions: int64, where the samples of each lie in the result.
        folder: holds the result in files mapped into memory; None: in memory.
    """
    tensors = {}
    for index, (name, first) in enumerate(buckets[0].tensors.items()):
        path = None if folder is None else folder / f"{index}.bin"
        tensors[name] = allocate(path, (sum(map(len, positions)), *first.shape[1:]), first.dtype)
        for bucket, rows in zip(buckets, positions, strict=True):
            tensors[name][rows] = bucket.tensors[name]
    return replace(buckets[0], tensors=tensors)
