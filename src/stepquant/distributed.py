"""Several processes working on one quantization, as ``torchrun`` or ``accelerate launch`` start them.

Every process runs the same program on the same inputs. Independent work items are distributed round-robin and each
result is broadcast, so that all processes hold the same state after every stage, bit for bit. Where a minibatch is
divided, gradients are summed, which agrees with one process up to float rounding. Only the main process writes files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from stepquant.errors import StepquantError, first_line

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: longer than the longest work item."""


@dataclass(frozen=True)
class Ranks:
    """The process group, seen from one process.

    Attributes:
        rank: index of this process.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """The ranks of torch's default process group; a single process if there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, items: int) -> slice:
        """The contiguous, possibly empty part of `items` items that belongs to this process."""
        return slice(self.rank * items // self.count, (self.rank + 1) * items // self.count)

    def map(self, work: Callable[[T], Any], items: Iterable[T]) -> Iterator[Any]:
        """Yield ``work(item)`` of every item in order; process ``i % count`` computes item i and broadcasts the result.

        A result is a tensor, or a tree (tuple, list, dictionary) of tensors and plain values.
        """
        if self.count == 1:
            yield from map(work, items)
            return
        items = list(items)
        for start in range(0, len(items), self.count):
            group = items[start : start + self.count]
            mine = work(group[self.rank]) if self.rank < len(group) else None
            for source in range(len(group)):
                yield self.broadcast(mine, source)

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Return the `value` of process `source` in every process."""
        if self.count == 1:
            return value
        leaves, tree = pytree.tree_flatten(value)
        mine = self.rank == source
        plan: list[Any] = [None]
        if mine:
            plan = [([_Shape.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree)]
        with _reporting_lost_processes():
            dist.broadcast_object_list(plan, src=source)
            outlines, tree = plan[0]
            received = []
            for index, outline in enumerate(outlines):
                if isinstance(outline, _Shape):
                    leaf = leaves[index].detach().contiguous() if mine else outline.empty()
                    # As bytes: backends differ in the dtypes they support.
                    if leaf.numel():
                        dist.broadcast(leaf.reshape(-1).view(torch.uint8), src=source)
                    received.append(leaf)
                else:
                    received.append(outline)
        return pytree.tree_unflatten(received, tree)

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every process, in the order of ranks."""
        return [self.broadcast(value, source) for source in range(self.count)]

    def all_reduce(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over all processes in every process."""
        if self.count > 1:
            value = value.detach().clone()
            with _reporting_lost_processes():
                dist.all_reduce(value)
        return value

    def all_reduce_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sum the gradients of all processes in place; a missing gradient counts as zero."""
        if self.count == 1:
            return
        parameters = list(parameters)
        flat = [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).reshape(-1)
            for parameter in parameters
        ]
        # One message for all parameters: with many small ones, latency would dominate.
        parts = self.all_reduce(torch.cat(flat)).split([part.numel() for part in flat])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)


@dataclass(frozen=True)
class _Shape:
    """Shape, dtype and device of a tensor."""

    size: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, tensor: Tensor) -> _Shape:
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device.type)

    def empty(self) -> Tensor:
        device = torch.device("cpu") if self.device == "cpu" else torch.device(self.device, torch.cuda.current_device())
        return torch.empty(self.size, dtype=self.dtype, device=device)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Connect the processes that a launcher started, for the duration of the context; a single process without one.

    Raises:
        StepquantError: if another process cannot be reached or ends early.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Ranks.current()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    with _reporting_lost_processes():
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Ranks.current()
    finally:
        dist.destroy_process_group()


@contextmanager
def _reporting_lost_processes() -> Iterator[None]:
    """Turn torch's error about a lost process into a `StepquantError`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise StepquantError(
            f"the connection between the processes of this run is lost ({first_line(error)}). "
            "Run the same command again; it continues from the finished stages."
        ) from None
