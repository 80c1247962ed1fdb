"""Several processes at one job, as ``torchrun`` or ``accelerate launch`` start them: who computes what, who is told.

Every process runs the same program on the same inputs. Independent pieces of work are dealt out in turn and each result
is sent to all, so that all processes hold the same state after every stage, bit for bit. Where a minibatch is divided,
gradients are added up, which agrees with one process to float rounding. Only the main process writes files.
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

from stepquant.errors import StepquantError

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others: longer than the longest piece of work that is dealt out."""


@dataclass(frozen=True)
class Ranks:
    """The processes of one job, seen from one of them.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """Those of torch's default process group; one process alone where there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes files and draws progress."""
        return self.rank == 0

    def share(self, items: int) -> slice:
        """The contiguous part of `items` things that falls to this process; it may be empty."""
        return slice(self.rank * items // self.count, (self.rank + 1) * items // self.count)

    def deal(self, work: Callable[[T], Any], items: Iterable[T]) -> Iterator[Any]:
        """``work(item)`` of every item, in order; item i is worked on by process i mod count alone, then sent to all.

        A result is a tensor, or a tree (tuple, list, dictionary) of tensors and plain values.
        """
        if self.count == 1:
            yield from map(work, items)
            return
        items = list(items)
        for start in range(0, len(items), self.count):
            group = items[start : start + self.count]
            mine = work(group[self.rank]) if self.rank < len(group) else None
            for owner in range(len(group)):
                yield self.send(mine, owner)

    def send(self, value: Any, owner: int = 0) -> Any:
        """What `value` is in process `owner`, in all of them."""
        if self.count == 1:
            return value
        leaves, tree = pytree.tree_flatten(value)
        mine = self.rank == owner
        plan: list[Any] = [None]
        if mine:
            plan = [([_Shape.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree)]
        with _together():
            dist.broadcast_object_list(plan, src=owner)
            outlines, tree = plan[0]
            received = []
            for index, outline in enumerate(outlines):
                if isinstance(outline, _Shape):
                    leaf = leaves[index].detach().contiguous() if mine else outline.empty()
                    # As bytes: backends differ in the dtypes they know.
                    if leaf.numel():
                        dist.broadcast(leaf.reshape(-1).view(torch.uint8), src=owner)
                    received.append(leaf)
                else:
                    received.append(outline)
        return pytree.tree_unflatten(received, tree)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in the order of their numbers."""
        return [self.send(value, owner) for owner in range(self.count)]

    def add(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes, in all of them."""
        if self.count > 1:
            value = value.detach().clone()
            with _together():
                dist.all_reduce(value)
        return value

    def add_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Add up the gradients of all processes, in place; one that is missing counts as zero."""
        if self.count == 1:
            return
        parameters = list(parameters)
        flat = [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).reshape(-1)
            for parameter in parameters
        ]
        # One message for all of them: with many small parameters latency would outweigh everything else.
        parts = self.add(torch.cat(flat)).split([part.numel() for part in flat])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def wait(self) -> None:
        """Go on when all processes have come here."""
        if self.count > 1:
            with _together():
                dist.barrier()


@dataclass(frozen=True)
class _Shape:
    """All of a tensor but its values."""

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
    """The processes that a launcher started, connected while the context lasts; one alone if there was no launcher.

    Raises:
        StepquantError: if the others cannot be reached, or end before their time.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Ranks.current()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    with _together():
        dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Ranks.current()
    finally:
        dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    """Tell in one sentence that another process is gone."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise StepquantError(
            f"the processes of this run lost each other ({str(error).strip().splitlines()[0]}): "
            "start the same command again, it continues from what is finished."
        ) from None
