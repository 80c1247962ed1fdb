"""What leaves calibration: integer weights and scale tables. Simulation and kernels read the same objects.

Input channels may be divided into consecutive groups that have a scale of their own: the two halves behind a skip
concatenation, or groups of a fixed size. `group_sizes` lists their sizes; one group is the usual case.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepquant.core.affine import largest_code
from stepquant.errors import StepquantError


class InvalidTable(StepquantError):
    """Integers or tables that break an invariant below; `what` says which, without a guess at why."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: the checkpoint is damaged, quantize the model again.")
        self.what = what


@dataclass(frozen=True)
class QuantizedWeight:
    """Integer weight of a linear or convolution: ``w[o, i] ~ (codes[o, i] - zero_point[g, o]) * scale[g, o]``.

    Attributes:
        codes: uint8 [out, in, *kernel], each below 2^bits.
        scale: float32 [G, out], finite and positive.
        zero_point: uint8 [G, out]; 128 throughout at 8 bits. So ``codes - zero_point`` always fits int8, and integer
            kernels need no zero point for weights.
        bits: 2 to 8.
        group_sizes: G sizes of consecutive groups of input channels, summing to `in`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    group_sizes: tuple[int, ...]

    def check(self) -> None:
        """Raise `StepquantError` unless the invariants above hold."""
        groups, out = len(self.group_sizes), self.codes.shape[0]
        _check_scale("weight", self.scale, (groups, out))
        _check_codes("weight zero points", self.zero_point, self.bits)
        _check_codes("weight codes", self.codes, self.bits)
        if self.zero_point.shape != self.scale.shape or sum(self.group_sizes) != self.codes.shape[1]:
            raise InvalidTable("weight groups do not add up")
        if self.bits == 8 and bool((self.zero_point != 128).any()):
            raise InvalidTable("8-bit weights must have zero point 128")

    def integers(self) -> Tensor:
        """``codes - zero_point`` as int8 [out, in, *kernel]."""
        zero_point = spread_zero_point(self.zero_point, self.group_sizes, self.codes.dim())
        return (self.codes.short() - zero_point).to(torch.int8)

    def dequantize(self) -> Tensor:
        """float32 [out, in, *kernel]."""
        scale = expand_groups(self.scale, self.group_sizes).t()
        return self.integers() * scale.reshape(scale.shape + (1,) * (self.codes.dim() - 2))


@dataclass(frozen=True)
class ActivationTable:
    """Grid of one activation at every step: ``x ~ (code - zero_point[r, s]) * scale[r, s]`` at table row r, group s.

    Attributes:
        scale: float32 [R, S], finite and positive; R is 1 (static) or the length of the clock's timesteps.
        zero_point: uint8 [R, S], below 2^bits.
        bits: 2 to 8; codes are unsigned.
        group_sizes: S sizes of consecutive groups of channels; empty for one group whatever the channels are.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int
    group_sizes: tuple[int, ...] = ()

    def check(self) -> None:
        """Raise `StepquantError` unless the invariants above hold."""
        if self.scale.dim() != 2 or self.scale.shape[0] == 0:
            raise InvalidTable(f"an activation table has shape {list(self.scale.shape)}")
        _check_scale("activation", self.scale, (self.scale.shape[0], max(1, len(self.group_sizes))))
        _check_codes("activation zero points", self.zero_point, self.bits)
        if self.zero_point.shape != self.scale.shape:
            raise InvalidTable("activation scales and zero points differ in shape")

    def at(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point at the clock's row: float32 [S] and uint8 [S], or [B, S] for a row of shape [B]."""
        if self.scale.shape[0] == 1:
            return self.scale[0], self.zero_point[0]
        # Not by `[row]`: on an accelerator that would wait for the row, and torch.compile cannot look up a number that
        # lies in a tensor.
        chosen = row.reshape(-1).to(self.scale.device)
        scale, zero_point = (values.index_select(0, chosen) for values in (self.scale, self.zero_point))
        return (scale, zero_point) if row.dim() else (scale[0], zero_point[0])


@dataclass(frozen=True)
class QuantizedLayer:
    """A linear or convolution in integers; ``activation`` is None where only the weight is quantized.

    Attributes:
        smoothing: float32 [in], finite and positive, or None for ones. The codes of input channel c stand for
            ``x_c / smoothing_c`` and those of the weight for ``w_c * smoothing_c``, so that their products are the same:
            channels of large values get coarser steps and small ones finer, at no cost beside the multiplication that
            quantizing is (SmoothQuant, arXiv 2211.10438, without a layer before that takes it up). Only with
            quantized activations, and for layers without channel groups of a convolution.
    """

    weight: QuantizedWeight
    bias: Tensor | None
    activation: ActivationTable | None
    smoothing: Tensor | None = None

    def check(self) -> None:
        """Raise `StepquantError` unless the invariants of all parts hold."""
        self.weight.check()
        if self.bias is not None and not bool(torch.isfinite(self.bias).all()):
            raise InvalidTable("a bias is not finite")
        if self.activation is not None:
            self.activation.check()
        if self.smoothing is not None:
            _check_scale("smoothing", self.smoothing, (self.weight.codes.shape[1],))


@dataclass(frozen=True)
class QuantizedAttention:
    """Grids of an attention's operands: query, key, value and probabilities; None where one stays floating point."""

    query: ActivationTable | None
    key: ActivationTable | None
    value: ActivationTable | None
    probability: ActivationTable | None

    def check(self) -> None:
        """Raise `StepquantError` unless the invariants of all grids hold."""
        for table in (self.query, self.key, self.value, self.probability):
            if table is not None:
                table.check()


def expand_groups(values: Tensor, group_sizes: tuple[int, ...]) -> Tensor:
    """Repeat per-group values along their last-but-one (weights, [G, out]) axis to one an input channel: [in, out]."""
    if len(group_sizes) == 1:
        return values.expand(group_sizes[0], *values.shape[1:])
    return values.repeat_interleave(torch.tensor(group_sizes).to(values.device), dim=0)


def spread_zero_point(zero_point: Tensor, group_sizes: tuple[int, ...], dims: int) -> Tensor:
    """uint8 [G, out] -> int16 [out, in, 1, ...] of `dims` dimensions, to be taken off a weight's codes."""
    spread = expand_groups(zero_point.short(), group_sizes).t()
    return spread.reshape(spread.shape + (1,) * (dims - 2))


def stored_zero_point(values: Tensor) -> Tensor:
    """A zero point as it ships, uint8; raises `StepquantError` where it is no integer that a code can be."""
    stored = values.to(torch.uint8)
    if bool((stored.to(values.dtype) != values).any()):
        raise InvalidTable("a zero point is no integer from 0 to 255")
    return stored.cpu().clone()


def _check_scale(what: str, scale: Tensor, shape: tuple[int, ...]) -> None:
    if scale.dtype != torch.float32 or tuple(scale.shape) != shape:
        raise InvalidTable(f"{what} scales are {scale.dtype} {list(scale.shape)}, not float32 {list(shape)}")
    if not bool(torch.isfinite(scale).all()) or bool((scale <= 0).any()):
        raise InvalidTable(f"a scale of the {what} is not a positive number")


def _check_codes(what: str, codes: Tensor, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise InvalidTable(f"{what} have {bits} bits")
    if codes.dtype != torch.uint8 or (codes.numel() and int(codes.max()) > largest_code(bits)):
        raise InvalidTable(f"{what} exceed {bits} bits")
