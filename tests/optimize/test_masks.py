"""Samples of unequal masks share a bucket only where no shape inside of the denoiser depends on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stepquant.calibration.samples import CalibrationSet
from stepquant.optimize.masks import separate_masks


class Cutting(nn.Module):
    """Cuts text to the longest of the batch, and masks it where lengths differ, as Lumina 2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Masked()

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(dim=1)
        longest = int(lengths.max())
        return sample + self.block(text[:, :longest], mask[:, :longest] if len(lengths.unique()) > 1 else None)


class Masked(nn.Module):
    def forward(self, text: Tensor, mask: Tensor | None) -> Tensor:
        return (text if mask is None else text * mask[:, :, None]).sum(dim=1)


class Masking(Cutting):
    """Masks text and cuts nothing, as PixArt does."""

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return sample + self.block(text, mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_samples_are_separated_where_shapes_depend_on_masks(dtype):
    lengths = torch.tensor([3, 1, 3, 2, 1])
    mask = (torch.arange(4) < lengths[:, None]).to(dtype)
    arguments = {"sample": torch.randn(5, 2), "timestep": torch.arange(5.0), "text": torch.randn(5, 4, 2), "mask": mask}
    samples = CalibrationSet.of(arguments, torch.arange(5))
    separate = separate_masks(Cutting(), samples)
    assert sorted(tuple(bucket.tensors["timestep"].tolist()) for bucket in separate.buckets) == [(0, 2), (1, 4), (3,)]
    assert separate.timesteps.tolist() == separate.numbers.tolist() == separate.steps.tolist()
    chosen = slice(0, len(separate.buckets[0]))
    assert torch.equal(separate.arguments(chosen)["text"], arguments["text"][separate.numbers[chosen]])
    assert separate_masks(Masking(), samples) is samples
