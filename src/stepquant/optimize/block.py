"""One block of a denoiser, in full precision and under calibration, and what each is called with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.layers import CalibratedLayer
from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.samples import CalibrationSet
from stepquant.distributed import Ranks
from stepquant.models.tracing import execution_order, fed_by_block_input
from stepquant.optimize.replay import SampleValues


@dataclass(frozen=True)
class Block:
    """One block during its reconstruction.

    Attributes:
        name: of the block in both denoisers.
        full_precision: the original denoiser.
        calibrated: the copy under calibration.
        clean, inputs: what the block is called with in full precision, and as the quantized blocks before it make it.
        batch_size: samples passed through the block at a time.
        ranks: share the samples.
        left_alone: names of layers that are not reconstructed.
    """

    name: str
    full_precision: nn.Module
    calibrated: CalibrationModel
    clean: SampleValues
    inputs: SampleValues
    samples: CalibrationSet
    batch_size: int
    ranks: Ranks
    left_alone: frozenset[str] = frozenset()

    @property
    def original(self) -> nn.Module:
        return self.full_precision.get_submodule(self.name)

    @property
    def module(self) -> nn.Module:
        """The block under calibration."""
        return self.calibrated.model.get_submodule(self.name)

    @cached_property
    def layers(self) -> dict[str, CalibratedLayer]:
        """The layers under calibration by name, in the order in which the block executes them."""
        known = self.calibrated.layers_in(self.name)
        executed = [self._full_name(name) for name in ("", *execution_order(self.original, self._call))]
        return {name: known[name] for name in executed if name in known and name not in self.left_alone}

    def layers_below(self, bits: int) -> dict[str, CalibratedLayer]:
        """The layers whose weights have fewer than `bits` bits, in execution order."""
        return {name: layer for name, layer in self.layers.items() if layer.weight_point.bits < bits}

    @property
    def points(self) -> list[ActivationPoint]:
        """The activation points of the block, but those of the layers left alone."""
        layers = [self.calibrated.layers[name] for name in self.left_alone if name in self.calibrated.layers]
        left = {id(layer.input_point) for layer in layers}
        return [point for point in self.calibrated.activation_points(self.name) if id(point) not in left]

    @property
    def last_layer(self) -> str | None:
        """The layer that is executed last."""
        return next(reversed(self.layers), None)

    @property
    def final_layer(self) -> str | None:
        """The layer that the block's output stands for: the last executed one that does not read the block's own input,
        as a shortcut does; the last one of all in a block where each does."""
        shortcuts = {self._full_name(name) for name in fed_by_block_input(self.original, self._call)}
        inner = [name for name in self.layers if name not in shortcuts]
        return next(reversed(inner or list(self.layers)), None)

    def batches(self) -> list[slice]:
        """All samples, in order."""
        return list(self.samples.batches(self.batch_size))

    @torch.no_grad()
    def observe(self) -> None:
        """Run this process's share of the samples through the block under calibration."""
        for chosen in self._shared_batches():
            args, kwargs = self.inputs.at(chosen)
            self.calibrated.clock.set(self.samples.timesteps[chosen])
            self.module(*args, **kwargs)

    def _shared_batches(self) -> Iterator[slice]:
        batches = self.batches()
        yield from batches[self.ranks.share(len(batches))]

    def _full_name(self, name: str) -> str:
        return f"{self.name}.{name}".rstrip(".")

    def _call(self) -> None:
        args, kwargs = self.clean.at(slice(0, 1))
        self.original(*args, **kwargs)
