"""Transforms of a layer that make its input and its weight easier to quantize, and leave their product as it is.

A `QuantizedLayer` holds an ordered list of them. A new transform is one class here, entered in `KINDS`: it names its
tensors, checks them, and says how it is simulated. A kernel declares the kinds that it supports; the reference runtime
simulates all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerTransform:
    """Base class; every field of a subclass is a tensor, stored under its name."""

    kind: ClassVar[str]

    @classmethod
    def identity(cls, inputs: int) -> LayerTransform:
        """The transform of `inputs` channels that changes nothing; its tensors have the shapes that are stored."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device | str) -> Self:
        """The transform with its tensors on `device`."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def problem(self, inputs: int) -> str | None:
        """What is wrong with the tensors for a layer of `inputs` input channels, or None."""
        raise NotImplementedError

    def transform_input(self, x: Tensor, channel_dim: int) -> Tensor:
        """The tensor that is quantized in place of the layer's input x."""
        return x

    def transform_scale(self, scale: Tensor, channels: slice, dims: int, channel_dim: int) -> Tensor:
        """The input's scale on `channels`; `scale` broadcasts against an input of `dims` dimensions."""
        return scale


@dataclass(frozen=True)
class Smoothing(LayerTransform):
    """SmoothQuant (arXiv 2211.10438): ``y = (x / factor) (w * factor)^T``, folded into the input's scale.

    Input channels of large values get coarser steps and small ones finer, at no cost beside the multiplication that
    quantizing is: ``code = round(x * (1 / (scale * factor))) + zero_point``.

    Attributes:
        factor: float32 [in], finite and positive.
    """

    kind: ClassVar[str] = "smoothing"

    factor: Tensor

    @classmethod
    def identity(cls, inputs: int) -> Smoothing:
        return cls(torch.ones(inputs, dtype=torch.float32))

    def problem(self, inputs: int) -> str | None:
        factor = self.factor
        if factor.dtype != torch.float32 or tuple(factor.shape) != (inputs,):
            return f"smoothing factors are {factor.dtype} {list(factor.shape)}; expected float32 {[inputs]}"
        if not bool(torch.isfinite(factor).all()) or bool((factor <= 0).any()):
            return "a smoothing factor is not a positive number"
        return None

    def transform_scale(self, scale: Tensor, channels: slice, dims: int, channel_dim: int) -> Tensor:
        shape = [1] * dims
        shape[channel_dim] = -1
        return scale * self.factor[channels].reshape(shape)


KINDS: dict[str, type[LayerTransform]] = {cls.kind: cls for cls in (Smoothing,)}
"""Name in a checkpoint -> transform."""
