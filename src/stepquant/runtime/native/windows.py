"""How a convolution over 1 to 3 dimensions, transposed or with channel groups, becomes windows over a padded plane.

Dimensions are (frames, rows, pixels); a convolution over fewer has one frame, or one row.

A transposed convolution is computed as a convolution of stride 1 with more outputs: all phases of a position. Along one
dimension, its output o is phase p of position q, with o + padding = q * stride + p, and

    y[q, p] = sum of x[q - m] * w[k] over all k and m with k * dilation = m * stride + p.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from stepquant.layers.conv import QuantizedConv

Sizes = tuple[int, int, int]
COLUMNS = 32
"""Outputs that the kernels compute together."""


class Window(NamedTuple):
    """Geometry of a convolution. `after` is negative where a transposed one does not read its last inputs."""

    size: Sizes = (1, 1, 1)
    stride: Sizes = (1, 1, 1)
    before: Sizes = (0, 0, 0)
    after: Sizes = (0, 0, 0)
    dilation: Sizes = (1, 1, 1)


class Convolution(NamedTuple):
    """A convolution and the windows that compute it.

    Attributes:
        shape: of the weight, [out, in / groups, *kernel].
        dims: dimensions of an input without batch and channels.
        kernel, stride, padding, dilation, output_padding: of the convolution.
    """

    window: Window
    shape: tuple[int, ...]
    dims: int
    groups: int
    transposed: bool
    kernel: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    output_padding: Sizes

    @classmethod
    def of(cls, module: QuantizedConv) -> Convolution:
        kernel, stride, dilation = (_three(x, 1) for x in (module.kernel_size, module.stride, module.dilation))
        padding, more = _three(module.padding, 0), _three(module.output_padding, 0)
        window = Window(kernel, stride, padding, padding, dilation)
        if module.transposed:
            reach = [step * (count - 1) for step, count in zip(dilation, kernel, strict=True)]
            before = [far // s for far, s in zip(reach, stride, strict=True)]
            after = [(reach[i] + more[i] - padding[i]) // stride[i] for i in range(3)]
            window = Window(_sizes(m + 1 for m in before), before=_sizes(before), after=_sizes(after))
        return cls(
            window, module.weight_shape, len(module.kernel_size), module.groups, module.transposed, kernel, stride,
            padding, dilation, more,
        )  # fmt: skip

    @property
    def phases(self) -> Sizes:
        """Outputs of a position along each dimension."""
        return self.stride if self.transposed else (1, 1, 1)

    @property
    def rows_are_runs(self) -> bool:
        """Whether all channels of a window's row are one run of bytes."""
        return self.window.dilation[2] == 1 and self.groups == 1

    def windowed(self, weight: Tensor) -> Tensor:
        """The weight of the windows, [outputs of a position, channels, *window.size], of one [out, in, *kernel]."""
        weight = weight.reshape(*weight.shape[:2], *self.kernel)
        if self.transposed:
            phases = weight.new_zeros(*self.stride, *weight.shape[:2], *self.window.size)
            phases[self._taps()] = weight.permute(2, 3, 4, 0, 1)
            return phases.flatten(0, 3)
        if self.groups == 1:
            return weight
        places = self._places()
        spread = weight.new_zeros(weight.shape[0], int(places.max()) + 1, *self.kernel)
        return spread.scatter_(1, places.expand(-1, -1, *self.kernel), weight)

    def integers(self, windowed: Tensor) -> Tensor:
        """Inverse of `windowed`."""
        if self.transposed:
            windowed = windowed.unflatten(0, (*self.stride, -1))[self._taps()].permute(3, 4, 0, 1, 2)
        elif self.groups > 1:
            windowed = windowed.gather(1, self._places().expand(-1, -1, *self.kernel))
        return windowed.reshape(*windowed.shape[:2], *self.shape[2:])

    def finished(self, y: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """The output of a transposed convolution of an input of `sizes`, of its phases [B, outputs, *positions]."""
        y = y.movedim(1, -1)
        y = y.reshape(len(y), *_three(tuple(y.shape[1:-1]), 1), *self.stride, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
        y = y.flatten(5, 6).flatten(3, 4).flatten(1, 2)
        for dim, size in enumerate(_three(sizes, 1)):
            reach = self.dilation[dim] * (self.kernel[dim] - 1) + self.output_padding[dim] + 1
            y = y.narrow(dim + 1, self.padding[dim], (size - 1) * self.stride[dim] - 2 * self.padding[dim] + reach)
        return y.contiguous().flatten(1, 4 - self.dims).movedim(-1, 1)

    def channel_starts(self) -> Tensor | None:
        """The first channel of the windows of each `COLUMNS` outputs, int64; None if windows have all channels."""
        return None if self.groups == 1 else self._first_groups() * self.shape[1]

    def _taps(self) -> tuple[Tensor | slice, ...]:
        """Index of each tap of the kernel in [*stride, out, in, *window.size]."""
        phases, places = [], []
        for dim, (count, stride) in enumerate(zip(self.kernel, self.stride, strict=True)):
            reach = torch.arange(count, device="cpu") * self.dilation[dim]
            shape = [-1 if other == dim else 1 for other in range(3)]
            phases.append((reach % stride).view(shape))
            places.append((self.window.before[dim] - reach // stride).view(shape))
        return (*phases, slice(None), slice(None), *places)

    def _first_groups(self) -> Tensor:
        """The first channel group of each `COLUMNS` outputs."""
        return torch.arange(0, self.shape[0], COLUMNS, device="cpu") // (self.shape[0] // self.groups)

    def _places(self) -> Tensor:
        """Where the window of each output's columns has its channels: int64 [out, in / groups, 1, 1, 1]."""
        outputs, inputs = self.shape[:2]
        output = torch.arange(outputs, device="cpu")
        group = output // (outputs // self.groups) - self._first_groups()[output // COLUMNS]
        return (group[:, None] * inputs + torch.arange(inputs, device="cpu"))[..., None, None, None]


def _three(values: tuple[int, ...], fill: int) -> Sizes:
    return _sizes((fill,) * (3 - len(values)) + tuple(values))


def _sizes(values: Iterable[int]) -> Sizes:
    frames, rows, pixels = values
    return frames, rows, pixels
