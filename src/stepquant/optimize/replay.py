"""Walk a denoiser block by block over the calibration samples, every block run exactly once.

To feed block k, the denoiser's own forward runs with the finished blocks answering from memory: only the glue between
blocks (concatenations, residuals, reshapes) is computed again. Works for any model whose description lists its blocks
in execution order. Outputs are kept in files mapped into memory, so that they need not fit into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepquant.calibration.placement import answering, device_of
from stepquant.calibration.samples import CalibrationSet
from stepquant.core.noise import SampleNoise
from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.files import allocate
from stepquant.layers.clock import StepClock
from stepquant.models.description import main_tensor
from stepquant.optimize.objectives import LayerOutputs


class BlockInputs:
    """The arguments that one block is called with, for all N samples: a tree whose tensors are [N, ...]."""

    def __init__(self, leaves: list[Any], structure: Any, samples: int) -> None:
        self.leaves, self.structure, self.samples = leaves, structure, samples

    def at(self, chosen: slice | Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for some of the samples."""
        return self._arguments([self._pick(leaf, chosen) for leaf in self.leaves], chosen)

    def mixed(
        self, other: BlockInputs, chosen: Tensor, probability: float, noise: SampleNoise
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As `at`, but each floating element comes from `other` with the given probability (QDrop)."""
        if probability == 0:
            return self.at(chosen)
        leaves = []
        for mine, theirs in zip(self.leaves, other.leaves, strict=True):
            leaf = self._pick(mine, chosen)
            if self._has_samples(mine) and leaf.is_floating_point():
                leaf = torch.where(noise.uniform(leaf) < probability, self._pick(theirs, chosen), leaf)
            leaves.append(leaf)
        return self._arguments(leaves, chosen)

    def _arguments(self, leaves: list[Any], chosen: slice | Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        count = chosen.stop - chosen.start if isinstance(chosen, slice) else len(chosen)
        return args, {name: count if value is _BATCH else value for name, value in kwargs.items()}

    def _pick(self, leaf: Any, chosen: slice | Tensor) -> Any:
        return leaf[chosen] if self._has_samples(leaf) else leaf

    def _has_samples(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == self.samples


class Replay:
    """One denoiser and the outputs of its finished blocks.

    Args:
        model: the denoiser.
        samples: its inputs.
        batch_size: samples passed through at a time.
        scratch: an empty folder for the files behind inputs and outputs.
        clock: the denoiser's; a block that runs alone has no timestep to set it by.
        ranks: share the running of blocks; each holds all outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: CalibrationSet,
        batch_size: int,
        scratch: Path,
        clock: StepClock | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.samples, self.batch_size, self.scratch = model, samples, batch_size, scratch
        self.clock, self.ranks = clock, ranks or Ranks()
        self._outputs: dict[str, tuple[list[Any], Any]] = {}

    @torch.no_grad()
    def inputs(self, block: str) -> BlockInputs:
        """What `block` is called with, given the recorded outputs of the blocks before it."""
        target = self.model.get_submodule(block)
        stubs = {name: self.model.get_submodule(name) for name in self._outputs}
        position, home = {"chosen": slice(0, 0)}, device_of(self.model)

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise Reached(args, {name: _BATCH if name == "batch_size" else value for name, value in kwargs.items()})

        def answer(name: str) -> Any:
            def forward(*_args: Any, **_kwargs: Any) -> Any:
                leaves, tree = self._outputs[name]
                chosen = position["chosen"]
                return pytree.tree_unflatten(
                    [leaf[chosen].clone().to(home) if isinstance(leaf, Tensor) else leaf for leaf in leaves], tree
                )

            return forward

        def called_with(chosen: slice) -> tuple[list[Any], Any]:
            position["chosen"] = chosen
            try:
                self.model(**self.samples.arguments(chosen))
            except Reached as reached:
                return pytree.tree_flatten((reached.given, reached.named))
            raise RuntimeError(f"block {block} was never reached: the description's order is wrong")

        batches = list(self.samples.batches(self.batch_size))
        with answering({module: answer(name) for name, module in stubs.items()} | {target: stop}):
            # The last batch may be smaller: with the first it tells which arguments have a row per sample.
            first, last = called_with(batches[0])[0], called_with(batches[-1])[0]
            joined = [
                self._allocate(f"inputs-{index}", leaf)
                if _is_per_sample((leaf, end), (batches[0], batches[-1]))
                else leaf
                for index, (leaf, end) in enumerate(zip(first, last, strict=True))
            ]
            for chosen in batches:
                leaves, structure = called_with(chosen)
                for memory, before, leaf in zip(joined, first, leaves, strict=True):
                    if memory is not before:
                        memory[chosen] = leaf
        return BlockInputs(joined, structure, len(self.samples))

    @torch.no_grad()
    def run(self, block: str, inputs: BlockInputs, record: Sequence[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Run `block` on all its inputs and remember its output.

        Returns:
            The output's main tensor, [N, ...], and those of the layers named in `record`.
        """
        module = self.model.get_submodule(block)
        leaves: list[Any] = []
        kept: dict[str, Tensor] = {}
        tree: Any = None

        def put_out(chosen: slice) -> tuple[list[Any], list[Tensor], Any]:
            args, kwargs = inputs.at(chosen)
            if self.clock is not None:
                self.clock.set(self.samples.tensors["timestep"][chosen])
            with LayerOutputs.recorded({name: self.model.get_submodule(name) for name in record}) as layers:
                produced, tree = pytree.tree_flatten(module(*args, **kwargs))
            size = chosen.stop - chosen.start
            if any(isinstance(leaf, Tensor) and leaf.shape[:1] != (size,) for leaf in produced):
                raise StepquantError(
                    f"block {block} folds another dimension into the batch, which block reconstruction does not "
                    "support. Use recipe minmax or ptq4dm."
                )
            return produced, [layers[name] for name in record], tree

        batches = list(self.samples.batches(self.batch_size))
        for chosen, put in zip(batches, self.ranks.map(put_out, batches), strict=True):
            produced, layers, tree = put
            if not leaves:
                leaves = [self._allocate(f"{block}.{index}", leaf) for index, leaf in enumerate(produced)]
                kept = {name: self._allocate(f"layer-{index}", layers[index]) for index, name in enumerate(record)}
            for memory, leaf in zip(leaves + list(kept.values()), produced + layers, strict=True):
                if isinstance(leaf, Tensor):
                    memory[chosen] = leaf
        self._outputs[block] = (leaves, tree)
        return main_tensor(pytree.tree_unflatten(leaves, tree)), kept

    def _allocate(self, name: str, like: Any) -> Any:
        if not isinstance(like, Tensor):
            return like
        return allocate(self.scratch / f"{name}.bin", (len(self.samples), *like.shape[1:]), like.dtype)


_BATCH = object()
"""Stands for an argument that is the number of samples in the batch."""


class Reached(Exception):
    """The module that was waited for has been called; ends a run that is of no use beyond it."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.given, self.named = args, kwargs


def _is_per_sample(leaves: tuple[Any, Any], batches: tuple[slice, slice]) -> bool:
    """Whether an argument, seen in two batches, has as many rows as each batch has samples."""
    return all(
        isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == chosen.stop - chosen.start
        for leaf, chosen in zip(leaves, batches, strict=True)
    )
