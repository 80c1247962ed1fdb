"""Attention with quantized operands, as a processor for the `Attention` of diffusers.

    scores = Q(query) Q(key)^T / sqrt(d);   output = Q(softmax(scores)) Q(value)

The flow around that (norms, projections, reshapes, residual) is the same while calibrating and when deployed;
subclasses only say what happens to the four operands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stepquant.core.affine import fake_quantize
from stepquant.core.qtensor import Grid, GridFormat, QuantizedAttention
from stepquant.layers.buffers import fill_grid, has_buffers_of, keep_dtypes, read_grid, register_grid
from stepquant.layers.clock import StepClock, of_samples
from stepquant.layers.format import OPERANDS
from stepquant.layers.kernel import Kernel

MOST_SCORES = 1 << 26
"""Scores of an attention that are held at a time: 256 MB in float32."""

REPRODUCED = ("AttnProcessor", "AttnProcessor2_0", "JointAttnProcessor2_0", "FluxAttnProcessor")
"""Processors of diffusers whose flow `AttentionProcessor` has."""


def can_quantize_attention(module: nn.Module) -> bool:
    """Whether `module` is an attention whose operands can be quantized: one of a flow that is reproduced here."""
    processor = getattr(module, "processor", None)
    known = type(processor).__name__ in REPRODUCED or isinstance(processor, AttentionProcessor)
    return known and hasattr(module, "set_processor") and hasattr(module, "to_q")


class AttentionProcessor(nn.Module):
    """Base: full-precision attention; `operand` is the place to quantize.

    hidden_states: float [B, N, C] or [B, C, H, W]; encoder_hidden_states: float [B, M, D] or None for self-attention;
    attention_mask: additive, broadcastable to [B, heads, N, M]; image_rotary_emb: rotary position embedding of joint
    attentions, two tensors [M + N, d].

    Joint attentions (SD3, Flux) attend over text and image together, with projections of their own for the text, and
    return both.
    """

    def operand(self, name: str, x: Tensor) -> Tensor:
        """Quantize operand `name` of `OPERANDS`; x: [B, heads, N, d], or [B, heads, N, M] for the probabilities."""
        return x

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        temb: Tensor | None = None,
    ) -> Any:
        # `Attention` passes a processor only those arguments that it finds in this signature. Not by way of Module's
        # own call: there offloading would take the attention for an input, and move it with all it holds.
        return type(self).forward(
            self, attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, temb
        )

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        temb: Tensor | None = None,
    ) -> Any:
        if is_joint(attn):
            return self._joint(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(encoder_hidden_states)
        batch, length = context.shape[:2]
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query, key, value = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        mixed = self.attend(query, key, value, attention_mask)
        hidden_states = mixed.transpose(1, 2).flatten(2)
        for module in attn.to_out:
            hidden_states = module(hidden_states)
        if image_shape is not None:
            hidden_states = hidden_states.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor

    def _joint(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        image_rotary_emb: tuple[Tensor, Tensor] | None,
    ) -> Any:
        """Text first, then image, as rotary positions count them; without them the order does not matter."""

        def project(x: Tensor, layer: Any, norm: Any = None) -> Tensor:
            x = layer(x).unflatten(-1, (attn.heads, -1))
            return x if norm is None else norm(x)

        query = project(hidden_states, attn.to_q, attn.norm_q)
        key = project(hidden_states, attn.to_k, attn.norm_k)
        value = project(hidden_states, attn.to_v)
        tokens = 0
        if encoder_hidden_states is not None:
            tokens = encoder_hidden_states.shape[1]
            query = torch.cat([project(encoder_hidden_states, attn.add_q_proj, attn.norm_added_q), query], dim=1)
            key = torch.cat([project(encoder_hidden_states, attn.add_k_proj, attn.norm_added_k), key], dim=1)
            value = torch.cat([project(encoder_hidden_states, attn.add_v_proj), value], dim=1)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mixed = self.attend(query, key, value, attention_mask).transpose(1, 2).flatten(2)
        text, image = mixed[:, :tokens], mixed[:, tokens:]
        for module in getattr(attn, "to_out", None) or ():
            image = module(image)
        if encoder_hidden_states is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)

    @property
    def repeatable(self) -> bool:
        """Whether `operand` does the same again on the same x, so that a backward pass may compute it again."""
        return True

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Scaled dot-product attention on quantized operands; all [B, heads, N, d].

        Where the scores of all heads are more than `MOST_SCORES`, as many heads are taken at a time as stay below it,
        and a backward pass computes their scores again: at 64x64 those of one sample and eight heads are 0.5 GB, and
        learning through them keeps half a dozen such tensors.
        """
        query, key = self.operand("query", query), self.operand("key", key)
        batch, heads, length = query.shape[:3]
        at_once = max(1, MOST_SCORES // (batch * length * key.shape[2]))
        if at_once >= heads:
            return self._attend_heads(query, key, value, mask)
        if mask is not None:
            mask = mask.expand(batch, heads, length, key.shape[2])
        again = torch.is_grad_enabled() and self.repeatable
        parts = []
        for start in range(0, heads, at_once):
            these = [None if x is None else x[:, start : start + at_once] for x in (query, key, value, mask)]
            if again:
                parts.append(checkpoint(self._attend_heads, *these, use_reentrant=False))
            else:
                parts.append(self._attend_heads(*these))  # type: ignore[arg-type]
        return torch.cat(parts, dim=1)

    def _attend_heads(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5)
        if mask is not None:
            scores = scores + mask
        probability = torch.softmax(scores, dim=-1)
        return self.operand("probability", probability) @ self.operand("value", value)


class AttentionKernel(Kernel):
    """Executes an attention: ``forward(query, key, value, mask, row)``, what `AttentionProcessor.attend` returns."""

    def fits(self, query: Tensor, key: Tensor) -> bool:
        """Whether it can take operands of these shapes; others run as without a kernel."""
        return True


class QuantizedAttentionProcessor(AttentionProcessor):
    """The deployed processor: grids as buffers ``query_scale``, ``query_zero_point``, ... of shape [R, 1, 1].

    Made without arguments, as an IP-Adapter does for every attention beside its own, it leaves all operands in floating
    point.

    Args:
        formats: operand -> shape of its grid.
    """

    def __init__(self, formats: dict[str, GridFormat] | None = None, clock: StepClock | None = None) -> None:
        super().__init__()
        self.formats, self.clock = dict(formats or {}), clock or StepClock()
        self.kernel: AttentionKernel | None = None
        for name, grid_format in self.formats.items():
            register_grid(self, name, grid_format)

    def fill(self, attention: QuantizedAttention) -> None:
        """Copy the grids of `attention`, whose formats must be this processor's."""
        for name in self.formats:
            fill_grid(self, name, getattr(attention, name))

    def grid(self, name: str) -> Grid:
        """The grid of operand `name`, one of `formats`."""
        return read_grid(self, name, self.formats[name])

    def attention(self) -> QuantizedAttention:
        """All four grids, checked; raises `StepquantError` on damage."""
        attention = QuantizedAttention(**{name: self.grid(name) if name in self.formats else None for name in OPERANDS})
        attention.check()
        return attention

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.kernel is not None and has_buffers_of(self, state_dict, prefix):  # it has tables made of these
            self.kernel = type(self.kernel)(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedAttentionProcessor:
        return keep_dtypes(self, lambda: super(QuantizedAttentionProcessor, self)._apply(fn, recurse))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        # Kernels of attention are for processors.
        if self.kernel is None or query.device.type != "cpu" or not self.kernel.fits(query, key):
            return super().attend(query, key, value, mask)
        return self.kernel(query, key, value, mask, self.clock.row)

    def operand(self, name: str, x: Tensor) -> Tensor:
        if name not in self.formats:
            return x
        scale, zero_point = self.grid(name).at(self.clock.row)
        if scale.dim() == 3:
            scale, zero_point = (per_sample(values[:, 0], x) for values in (scale, zero_point))
        return fake_quantize(x.float(), scale, zero_point, self.formats[name].bits).to(x.dtype)


def is_joint(attn: Any) -> bool:
    """Whether an attention is one over text and image together, or of a model made of those."""
    return getattr(attn, "add_q_proj", None) is not None or not hasattr(attn, "group_norm")


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """[B, 1] -> [B', 1, ...] to broadcast against x [B', ...], where B' is a multiple of B (samples stay together)."""
    return of_samples(values, x.shape[0]).reshape(-1, *(1,) * (x.dim() - 1))
