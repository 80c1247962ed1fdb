"""Random numbers per sample, independent of how a minibatch is divided among processes."""

from __future__ import annotations

import torch
from torch import Tensor

PRIME = 1_000_003


class SampleNoise:
    """Uniform random numbers for the samples of a minibatch, from one generator per sample.

    A sample gets the same numbers in every process and beside any other samples.

    Args:
        seed: seed of the stage.
        iteration: iteration of the optimizer.
        places: indices of the samples in the whole minibatch.
    """

    def __init__(self, seed: int, iteration: int, places: range) -> None:
        self.seeds = [((seed * PRIME + iteration) * PRIME + place) % (1 << 63) for place in places]
        self._generators: list[torch.Generator] = []

    def uniform(self, like: Tensor) -> Tensor:
        """Numbers in [0, 1) of the shape and dtype of `like`, [B', ...] where B' is a multiple of the samples."""
        if not self._generators:
            self._generators = [torch.Generator(like.device).manual_seed(seed) for seed in self.seeds]
        numbers = torch.empty_like(like, memory_format=torch.contiguous_format)
        for generator, part in zip(self._generators, numbers.chunk(len(self._generators)), strict=True):
            part.uniform_(generator=generator)
        return numbers
