"""Separate samples whose masks change the shapes inside of a denoiser.

Lumina 2 cuts its text to the longest of a batch, and masks it only where lengths differ. What a block is called with
then depends on the samples that share its batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepquant.calibration.buckets import Bucket
from stepquant.calibration.samples import CalibrationSet


@torch.no_grad()
def separate_masks(model: nn.Module, samples: CalibrationSet) -> CalibrationSet:
    """The samples, divided into buckets of equal masks where the shapes inside of `model` depend on them.

    The shortest and the longest mask of each bucket are compared, each in a batch with itself and with the other.
    """
    groups = torch.zeros(len(samples), dtype=torch.int64)
    for bucket, start in zip(samples.buckets, samples.ranges.starts, strict=False):
        if (masks := _masks(bucket)) is None:
            continue
        distinct, group = masks.unique(dim=0, return_inverse=True)
        if len(distinct) == 1:
            continue
        lengths = masks.sum(dim=1)
        shortest, longest = start + int(lengths.argmin()), start + int(lengths.argmax())
        pairs = (shortest, shortest), (longest, longest), (shortest, longest)
        first, *others = (_structure(model, samples.arguments(torch.tensor(pair))) for pair in pairs)
        if any(other != first for other in others):
            groups[start : start + len(bucket)] = group
    return samples.divided(groups) if groups.any() else samples


def _masks(bucket: Bucket) -> Tensor | None:
    """The masks of each sample, bool [n, ...], side by side: parts with several entries that are all 0 or 1."""
    found = [
        tensor.flatten(1).bool()
        for tensor in bucket.tensors.values()
        if tensor.dim() > 1 and not tensor.is_floating_point() and bool(((tensor == 0) | (tensor == 1)).all())
    ]
    return torch.cat(found, dim=1) if found else None


def _structure(model: nn.Module, arguments: dict[str, Any]) -> list[Any]:
    """What every module inside of a model is called with, without the values of tensors."""
    calls: list[Any] = []

    def see(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        calls.append((tree, [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]))

    handles = [module.register_forward_pre_hook(see, with_kwargs=True) for module in model.modules()]
    try:
        model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return calls
