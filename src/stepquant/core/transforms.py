"""Transforms that make the input and weight of a layer easier to quantize without changing their product.

A `QuantizedLayer` holds an ordered list of them. A new transform is one class here, registered in `KINDS`, with its
tensors, their checks and its simulation. Kernels declare the kinds they support; the reference runtime simulates all.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerTransform:
    """Base class; every field of a subclass is a tensor, stored under the field's name."""

    kind: ClassVar[str]

    @classmethod
    def identity(cls, inputs: int) -> LayerTransform:
        """Identity transform of `inputs` channels, with tensors of the shapes that are stored."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: torch.device | str) -> Self:
        """The transform with its tensors on `device`."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def problem(self, inputs: int) -> str | None:
        """Describe what is wrong with the tensors for a layer of `inputs` input channels, or return None."""
        raise NotImplementedError

    def transform_input(self, x: Tensor, channel_dim: int) -> Tensor:
        """The tensor that is quantized in place of the layer's input x."""
        return x

    def restore_weight(self, weight: Tensor) -> Tensor:
        """The weight [out, in, *kernel] for the layer's own input, of one for the transformed input."""
        return weight

    def transform_scale(self, scale: Tensor, channels: slice, dims: int, channel_dim: int) -> Tensor:
        """The input's scale on `channels`; `scale` broadcasts against an input of `dims` dimensions."""
        return scale


@dataclass(frozen=True)
class Smoothing(LayerTransform):
    """SmoothQuant (arXiv 2211.10438): ``y = (x / factor) (w * factor)^T``, folded into the input's scale.

    Channels with large values get coarser steps, channels with small values finer ones, at no extra cost:
    ``code = round(x * (1 / (scale * factor))) + zero_point``.

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

    def restore_weight(self, weight: Tensor) -> Tensor:
        return weight / self.factor.reshape(-1, *(1,) * (weight.dim() - 2))

    def transform_scale(self, scale: Tensor, channels: slice, dims: int, channel_dim: int) -> Tensor:
        shape = [1] * dims
        shape[channel_dim] = -1
        return scale * self.factor[channels].reshape(shape)


KINDS: dict[str, type[LayerTransform]] = {cls.kind: cls for cls in (Smoothing,)}
"""Name in a checkpoint -> transform."""
