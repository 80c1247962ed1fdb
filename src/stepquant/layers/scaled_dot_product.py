"""Scaled dot-product attention on quantized operands.

scores = scale * Q(query) Q(key)^T;   output = Q(softmax(scores + mask)) Q(value)

With dynamic grids of probability and value, ``Q(softmax(scores + mask) * share) (Q(value) / share)`` with the scale of
each token's value over the largest of them, ``share``: then a row's sum is one of integers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepquant.errors import StepquantError

MOST_SCORES = 1 << 26
"""Scores of an attention that are in memory at the same time: 256 MB in float32."""


class ScaledDotProduct(nn.Module):
    """In full precision; subclasses quantize in `operand`."""

    def operand(self, name: str, x: Tensor) -> Tensor:
        """Quantize operand `name` of `OPERANDS`; x: [B, heads, N, d], or [B, heads, N, M] for the probabilities."""
        return x

    def scale_of_value(self, value: Tensor) -> Tensor | None:
        """The scale of each token of a value, [B, heads, M, 1], if it and the probabilities have dynamic grids."""
        return None

    @property
    def repeatable(self) -> bool:
        """Whether `operand` returns the same for the same x, so that a backward pass may compute it again."""
        return True

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None
    ) -> Tensor:
        """Scaled dot-product attention on quantized operands.

        If all heads have more than `MOST_SCORES` scores, heads are processed in parts that stay below it, and a
        backward pass computes the scores of a part again. At 64x64 the scores of one sample and eight heads take
        0.5 GB, and training keeps half a dozen tensors of that size.

        Args:
            query: float [B, heads, N, d].
            key, value: float [B, heads, M, d], or [B, heads / g, M, d] of which each head serves g heads of the query.
            scale: factor of the scores, 1 / sqrt(d) by default.
            mask: boolean (True: attend) or additive, broadcastable to [B, heads, N, M].

        Returns:
            float [B, heads, N, d]; zeros for a query whose keys are all masked.
        """
        key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
        query, key = self.operand("query", query), self.operand("key", key)
        batch, heads, length = query.shape[:3]
        if mask is not None:
            mask = additive_mask(mask, (batch, heads, length, key.shape[2]))
        at_once = max(1, MOST_SCORES // (batch * length * key.shape[2]))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if at_once >= heads:
            return self._attend_heads(query, key, value, mask, scale)
        recompute = torch.is_grad_enabled() and self.repeatable
        parts = []
        for start in range(0, heads, at_once):
            part = [x[:, start : start + at_once] for x in (query, key, value)]
            part.append(mask if mask is None or mask.shape[1] == 1 else mask[:, start : start + at_once])  # type: ignore[arg-type]
            if recompute:
                parts.append(checkpoint(self._attend_heads, *part, scale, use_reentrant=False))
            else:
                parts.append(self._attend_heads(*part, scale))  # type: ignore[arg-type, call-arg]
        return torch.cat(parts, dim=1)

    def _attend_heads(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        scores = (query @ key.transpose(-1, -2)) * scale
        probability = torch.softmax(scores, dim=-1) if mask is None else _masked_softmax(scores, mask)
        value_scale = self.scale_of_value(value)
        if value_scale is None:
            return self.operand("probability", probability) @ self.operand("value", value)
        # Integers are summed over tokens: the scale of a token's value belongs to its probability.
        share = value_scale / value_scale.amax(-2, keepdim=True)
        weight = self.operand("probability", probability * share.transpose(-1, -2).to(probability.dtype))
        return weight @ (self.operand("value", value).float() / share).to(value.dtype)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[..., heads / g, M, d] -> [..., heads, M, d], each head g times in a row."""
    return x if x.shape[-3] == heads else x.repeat_interleave(heads // x.shape[-3], dim=-3)


def additive_mask(mask: Tensor, scores: tuple[int, ...]) -> Tensor:
    """Convert a mask to numbers that are added to scores.

    Args:
        mask: boolean (True: attend) or additive, broadcastable to `scores`.
        scores: the shape [B, heads, N, M].

    Returns:
        float32 or float64, four dimensions that broadcast to `scores`.

    Raises:
        StepquantError: if the mask does not broadcast to `scores`.
    """
    sizes = (1,) * (len(scores) - mask.dim()) + tuple(mask.shape)
    if len(sizes) != len(scores) or any(size not in (1, full) for size, full in zip(sizes, scores, strict=True)):
        raise StepquantError(
            f"an attention mask has shape {list(mask.shape)}; expected one that broadcasts to the scores "
            f"[B, heads, N, M] = {list(scores)}."
        )
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        mask = zeros.masked_fill_(mask.logical_not(), -torch.inf)
    return (mask if mask.dtype == torch.float64 else mask.float()).view(sizes)


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """``softmax(scores + mask)`` over the last dimension, 0 in rows whose mask is -inf throughout.

    In float32 at least: half precision cannot hold the sum of a score and its smallest number.
    """
    empty = (mask == -torch.inf).all(dim=-1, keepdim=True)
    probability = torch.softmax(scores + mask.masked_fill(empty, 0.0), dim=-1)
    return probability.masked_fill(empty, 0.0).to(scores.dtype)
