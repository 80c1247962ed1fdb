"""Attention with quantized operands, as an attention processor of diffusers.

The operations around `ScaledDotProduct` (norms, projections, reshapes, residual) are the same in calibration and in
inference. Attentions with other processors are quantized by `stepquant.layers.interception`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from stepquant.core.affine import fake_quantize
from stepquant.core.dynamic import DynamicFormat, DynamicGrid
from stepquant.core.qtensor import Grid, GridFormat, QuantizedAttention
from stepquant.layers.buffers import fill_grid, has_buffers_of, keep_dtypes, read_grid, register_grid
from stepquant.layers.clock import StepClock, of_samples
from stepquant.layers.format import OPERANDS
from stepquant.layers.kernel import Kernel
from stepquant.layers.scaled_dot_product import ScaledDotProduct

REPRODUCED = ("AttnProcessor", "AttnProcessor2_0", "JointAttnProcessor2_0", "FluxAttnProcessor")
"""Attention processors of diffusers that `AttentionProcessor` computes the same as."""


def can_quantize_attention(module: nn.Module) -> bool:
    """Whether `AttentionProcessor` can replace the processor of `module`; others are intercepted."""
    processor = getattr(module, "processor", None)
    known = type(processor).__name__ in REPRODUCED or isinstance(processor, AttentionProcessor)
    separate = hasattr(module, "to_q") and not getattr(module, "fused_projections", False)
    return known and separate and hasattr(module, "set_processor")


class AttentionProcessor(ScaledDotProduct):
    """Full-precision attention, the base class; subclasses quantize in `operand`.

    Joint attentions (SD3, Flux) attend over text and image together, with separate projections for the text, and return
    both.

    Args:
        hidden_states: float [B, N, C] or [B, C, H, W].
        encoder_hidden_states: float [B, M, D], or None for self-attention.
        attention_mask: boolean (True: attend) or additive; see `_prepared_mask` for shapes.
        image_rotary_emb: rotary position embedding of joint attentions, two tensors [M + N, d].
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        temb: Tensor | None = None,
    ) -> Any:
        # `Attention` passes only the arguments in this signature. Not through `Module.__call__`: there offloading would
        # take the attention for an input and move it with all its parameters.
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
        if attention_mask is not None:
            attention_mask = _prepared_mask(attn, attention_mask, *context.shape[:2])
        query, key, value = (
            _project(attn, x, layer, norm)
            for x, layer, norm in (
                (hidden_states, attn.to_q, attn.norm_q),
                (context, attn.to_k, attn.norm_k),
                (context, attn.to_v, None),
            )
        )
        hidden_states = self._mix(query, key, value, attention_mask)
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
        """Text tokens come first, then image tokens: rotary embeddings count positions in this order."""
        query = _project(attn, hidden_states, attn.to_q, attn.norm_q)
        key = _project(attn, hidden_states, attn.to_k, attn.norm_k)
        value = _project(attn, hidden_states, attn.to_v)
        tokens = 0
        if encoder_hidden_states is not None:
            text, tokens = encoder_hidden_states, encoder_hidden_states.shape[1]
            query = torch.cat([_project(attn, text, attn.add_q_proj, attn.norm_added_q), query], dim=1)
            key = torch.cat([_project(attn, text, attn.add_k_proj, attn.norm_added_k), key], dim=1)
            value = torch.cat([_project(attn, text, attn.add_v_proj), value], dim=1)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        mixed = self._mix(query, key, value, attention_mask)
        text, image = mixed[:, :tokens], mixed[:, tokens:]
        for module in getattr(attn, "to_out", None) or ():
            image = module(image)
        if encoder_hidden_states is None:
            return image
        return image, text if attn.context_pre_only else attn.to_add_out(text)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """`attend` for operands [B, N, heads, d]; returns [B, N, heads * d]."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return self.attend(query, key, value, mask).transpose(1, 2).flatten(2)


def _project(attn: Any, x: Tensor, layer: Any, norm: Any = None) -> Tensor:
    """Heads of ``norm(layer(x))``: [B, N, C] -> [B, N, heads, d]."""
    x = layer(x).unflatten(-1, (attn.heads, -1))
    return x if norm is None else norm(x)


def _prepared_mask(attn: Any, mask: Tensor, batch: int, keys: int) -> Tensor:
    """The mask of diffusers' `Attention`, in a shape that broadcasts to [B, heads, N, M].

    In diffusers the first dimension of [B, M] and [B, 1 or N, M] is the batch, that of [B * heads, 1 or N, M] the batch
    and heads. Any other mask is not changed.
    """
    if mask.dim() not in (2, 3) or len(mask) not in (batch, batch * attn.heads):
        return mask
    mask = attn.prepare_attention_mask(mask, keys, batch)
    return mask.view(batch, attn.heads, -1, mask.shape[-1])


class AttentionKernel(Kernel):
    """Executes an attention: ``forward(query, key, value, mask, row, scale)`` computes `ScaledDotProduct.attend`."""

    @staticmethod
    def supports(processor: Any) -> bool:
        """Whether all four operands of a `QuantizedAttentionProcessor` have stored grids, or all have dynamic ones."""
        return set(processor.formats) == set(OPERANDS) and len({type(each) for each in processor.formats.values()}) == 1

    def fits(self, query: Tensor, key: Tensor) -> bool:
        """Whether the kernel takes operands of these shapes; others run without a kernel."""
        return True


class QuantizedAttentionProcessor(AttentionProcessor):
    """The processor of inference: grids are buffers ``query_scale``, ``query_zero_point``, ... of shape [R, 1, 1].

    Without arguments, as an IP-Adapter creates it for every attention but its own, all operands stay in floating point.

    Args:
        formats: operand -> shape of its grid.
    """

    def __init__(
        self, formats: dict[str, GridFormat | DynamicFormat] | None = None, clock: StepClock | None = None
    ) -> None:
        super().__init__()
        self.formats, self.clock = dict(formats or {}), clock or StepClock()
        self.kernel: AttentionKernel | None = None
        for name, grid_format in self.formats.items():
            register_grid(self, name, grid_format)

    def fill(self, attention: QuantizedAttention) -> None:
        """Copy the grids of `attention`, whose formats must be this processor's."""
        for name in self.formats:
            fill_grid(self, name, getattr(attention, name))

    def grid(self, name: str) -> Grid | DynamicGrid:
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

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None
    ) -> Tensor:
        # accelerate offloads the grids, and loads them around `forward` only.
        hook: Any = getattr(self, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self)
        # Attention kernels exist only for the CPU.
        alike = key.shape == value.shape and key.shape[3] == query.shape[3] and len(key) in (1, len(query))
        alike = alike and query.shape[1] % key.shape[1] == 0
        if self.kernel is None or not alike or query.device.type != "cpu" or not self.kernel.fits(query, key):
            output = super().attend(query, key, value, mask, scale)
        else:
            output = self.kernel(query, key, value, mask, self.clock.row, scale)
        return output if hook is None else hook.post_forward(self, output)

    def operand(self, name: str, x: Tensor) -> Tensor:
        if name not in self.formats:
            return x
        grid = self.grid(name)
        bits = bits_of(grid, self.clock.row, x)
        scale, zero_point = grid.of(x, bits=bits) if isinstance(grid, DynamicGrid) else grid.at(self.clock.row)
        if isinstance(grid, Grid) and scale.dim() == 3:
            scale, zero_point = (per_sample(values[:, 0], x) for values in (scale, zero_point))
        return fake_quantize(x.float(), scale, zero_point, bits).to(x.dtype)

    def scale_of_value(self, value: Tensor) -> Tensor | None:
        grids = (self.grid(name) for name in ("probability", "value") if name in self.formats)
        return dynamic_scale(value, self.clock.row, *grids)


def dynamic_scale(value: Tensor, row: Tensor, *grids: Grid | DynamicGrid | None) -> Tensor | None:
    """`ScaledDotProduct.scale_of_value` for the grids of probability and value, at the clock's row."""
    if len(grids) < 2 or not isinstance(grids[0], DynamicGrid) or not isinstance(grids[1], DynamicGrid):
        return None
    return grids[1].of(value, bits=bits_of(grids[1], row, value))[0]


def is_joint(attn: Any) -> bool:
    """Whether an attention attends over text and image together, or belongs to a model of such attentions."""
    return getattr(attn, "add_q_proj", None) is not None or not hasattr(attn, "group_norm")


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """[B, 1] -> [B', 1, ...] to broadcast against x [B', ...], where B' is a multiple of B (samples stay together)."""
    return of_samples(values, x.shape[0]).reshape(-1, *(1,) * (x.dim() - 1))


def bits_of(grid: Grid | DynamicGrid, row: Tensor, x: Tensor) -> int | Tensor:
    """Bits of a grid at the clock's row, broadcastable against x."""
    bits = grid.bits_at(row)
    if isinstance(bits, int):
        return bits
    bits = bits.to(x.device)
    return per_sample(bits[:, None], x) if bits.dim() else bits
