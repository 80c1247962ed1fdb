"""Walk a denoiser block by block over the calibration samples, every block run exactly once.

To feed block k, the denoiser's own forward runs with the finished blocks answering from memory: only the glue between
blocks (concatenations, residuals, reshapes) is computed again. Works for any model whose description lists its blocks
in execution order. Outputs are kept in files mapped into memory, so that they need not fit into it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepquant.calibration.buckets import Bucket, Ranges
from stepquant.calibration.placement import answering, device_of
from stepquant.calibration.samples import CalibrationSet
from stepquant.core.noise import SampleNoise
from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.files import allocate
from stepquant.layers.clock import StepClock
from stepquant.models.description import main_tensor
from stepquant.optimize.objectives import LayerOutputs
from stepquant.pipelines.layout import UnknownLayoutError, find_layout, pack, unpack


@dataclass(frozen=True)
class SampleValues:
    """A value of any structure for all N samples, whose parts are stored sample by sample.

    Attributes:
        buckets: samples for which the value has the same structure.
        ranges: of the samples in each.
    """

    buckets: tuple[Bucket, ...]
    ranges: Ranges

    @classmethod
    def of(cls, value: Any, samples: int) -> SampleValues:
        """A value whose tensors are [N, ...]."""
        one, two = (pytree.tree_map_only(Tensor, itemgetter(slice(count)), value) for count in (1, 2))
        return cls((Bucket(*pack(value, find_layout(one, two))),), Ranges((samples,)))

    def at(self, chosen: slice | Tensor) -> Any:
        """The value for some samples of one bucket."""
        bucket, samples = self._chosen(chosen)
        return unpack(bucket.template, bucket.tensors, samples)

    def mixed(self, other: SampleValues, chosen: Tensor, probability: float, noise: SampleNoise) -> Any:
        """As `at`, but each floating element comes from `other` with the given probability (QDrop)."""
        if probability == 0:
            return self.at(chosen)
        mine, samples = self._chosen(chosen)
        theirs, _ = other._chosen(chosen)
        tensors = {
            name: torch.where(noise.uniform(tensor) < probability, theirs.tensors[name], tensor)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in mine.tensors.items()
        }
        return unpack(mine.template, tensors, samples)

    def _chosen(self, chosen: slice | Tensor) -> tuple[Bucket, int]:
        index, inside = self.ranges.locate(chosen)
        size = self.ranges.sizes[index]
        return self.buckets[index].at(inside), len(range(size)[inside]) if isinstance(inside, slice) else len(inside)


class BlockOutputs:
    """Outputs of a block and of layers inside it, for all samples."""

    def __init__(self, values: SampleValues) -> None:
        self.values = values

    def at(self, chosen: slice | Tensor) -> LayerOutputs:
        """Those for some samples of one bucket."""
        value = self.values.at(chosen)
        return LayerOutputs(main_tensor(value["block"]), value["layers"])


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
        self._outputs: dict[str, SampleValues] = {}

    @torch.no_grad()
    def inputs(self, block: str) -> SampleValues:
        """What `block` is called with, given the recorded outputs of the blocks before it: ``(args, kwargs)``.

        Raises:
            StepquantError: if the samples' parts of its arguments cannot be told apart.
        """
        target = self.model.get_submodule(block)
        stubs = {name: self.model.get_submodule(name) for name in self._outputs}
        home, position = device_of(self.model), {"chosen": slice(0)}

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise Reached(args, kwargs)

        def answer(name: str) -> Any:
            def forward(*_args: Any, **_kwargs: Any) -> Any:
                output = self._outputs[name].at(position["chosen"])
                return pytree.tree_map_only(Tensor, lambda x: x.clone().to(home), output)

            return forward

        def called_with(chosen: Any) -> Any:
            position["chosen"] = chosen
            try:
                self.model(**self.samples.arguments(chosen))
            except Reached as reached:
                return reached.given, reached.named
            raise RuntimeError(f"block {block} was never reached: the description's order is wrong")

        with answering({module: answer(name) for name, module in stubs.items()} | {target: stop}):
            return self._stored("inputs", block, called_with, map)

    @torch.no_grad()
    def run(self, block: str, inputs: SampleValues, record: Sequence[str] = ()) -> BlockOutputs:
        """Run `block` on all its inputs, and remember its output.

        Args:
            record: names of layers whose outputs are recorded, too.

        Raises:
            StepquantError: if the samples' parts of its output cannot be told apart.
        """
        module = self.model.get_submodule(block)
        layers = {name: self.model.get_submodule(name) for name in record}

        def put_out(chosen: Any) -> Any:
            args, kwargs = inputs.at(chosen)
            if self.clock is not None:
                self.clock.set(self.samples.timesteps[chosen])
            with LayerOutputs.recorded(layers) as recorded:
                output = module(*args, **kwargs)
            return {"block": output, "layers": dict(recorded)}

        values = self._stored(block, block, put_out, self.ranks.map)
        outputs = tuple(_member(bucket, "block") for bucket in values.buckets)
        self._outputs[block] = SampleValues(outputs, values.ranges)
        return BlockOutputs(values)

    def _stored(
        self,
        name: str,
        block: str,
        compute: Callable[[Any], Any],
        shared_map: Callable[[Callable[[slice], Any], Sequence[slice]], Iterator[Any]],
    ) -> SampleValues:
        """What `compute` returns for all samples.

        Args:
            name: of the files.
            shared_map: computes batches, some of them in other processes.
        """
        ranges, numbers, buckets = self.samples.ranges, count(), []
        for start, size in zip(ranges.starts, ranges.sizes, strict=False):
            one, other = (compute(torch.full((number,), start)) for number in (1, 2))
            try:
                layout = find_layout(one, other)
                template, first = pack(one, layout)
            except UnknownLayoutError as error:
                raise StepquantError(
                    f"block {block} cannot be reconstructed: in its calls, {error.found}. Use a recipe that does not "
                    "work block by block, such as minmax or ptq4dm."
                ) from None
            memory = {
                part: allocate(self.scratch / f"{name}-{next(numbers)}.bin", (size, *tensor.shape[1:]), tensor.dtype)
                for part, tensor in first.items()
            }

            def parts(chosen: slice, layout: Any = layout) -> dict[str, Tensor]:
                return pack(compute(chosen), layout)[1]

            batches = [
                slice(at, min(at + self.batch_size, start + size)) for at in range(start, start + size, self.batch_size)
            ]
            for chosen, tensors in zip(batches, shared_map(parts, batches), strict=True):
                for part, rows in memory.items():
                    rows[chosen.start - start : chosen.stop - start] = tensors[part]
            buckets.append(Bucket(template, memory))
        return SampleValues(tuple(buckets), ranges)


def _member(bucket: Bucket, name: str) -> Bucket:
    """One member of a bucket of dictionaries."""
    return Bucket(bucket.template[name], {part: x for part, x in bucket.tensors.items() if part.split(".")[0] == name})


class Reached(Exception):
    """The module that was waited for has been called; ends a run that is of no use beyond it."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.given, self.named = args, kwargs
