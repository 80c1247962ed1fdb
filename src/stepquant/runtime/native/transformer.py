"""Fuse the float operations of diffusers' transformer blocks into the integer layers next to them.

    attention      layer normalization, modulation and quantization in one pass; gate and residual when results are
                   stored
    feed-forward   the same; GELU or GEGLU in the pass of the second quantization, as in the feed-forward of any other
                   transformer block
    around them    group normalization in the input projection, the residual in the output projection

As in `blocks`, only `forward` is replaced.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.activations import GEGLU, GELU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from stepquant.layers.attention import QuantizedAttentionProcessor
from stepquant.layers.kernel import opaque
from stepquant.runtime.native.fusion import is_unchanged
from stepquant.runtime.native.kernel import is_native
from stepquant.runtime.native.norms import Norm, dense, group_norm, is_present, layer_norm
from stepquant.runtime.native.replay import replayed

NORMS = ("layer_norm", "ada_norm_zero")
"""Normalizations of a `BasicTransformerBlock` that are fused: those of Stable Diffusion and DiT."""


def fits_block(block: BasicTransformerBlock) -> bool:
    """Whether every layer of a block is of the kind that `block_forward` expects."""
    if block.norm_type not in NORMS:
        return False
    norms = [block.norm1 if block.norm_type == "layer_norm" else block.norm1.norm, block.norm3]
    attentions = [block.attn1]
    if block.attn2 is not None:
        norms.append(block.norm2)
        attentions.append(block.attn2)
    return (
        block.pos_embed is None
        and not block.only_cross_attention
        and all(isinstance(norm, nn.LayerNorm) and is_present(norm) for norm in norms)
        and all(_fits_attention(attention) for attention in attentions)
        and _activation(block.ff) is not None
        and block.ff.net[0].proj.kernel.whole
    )


@opaque
def block_forward(
    block: BasicTransformerBlock,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """``BasicTransformerBlock.forward``; hidden_states: [B, N, C], encoder_hidden_states: [B, M, D]."""
    y: Tensor
    masked = attention_mask is not None or encoder_attention_mask is not None
    if masked or cross_attention_kwargs or block._chunk_size is not None or not is_unchanged(block):
        y = type(block).forward(
            block, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
            cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
        return y
    x = hidden_states.contiguous()
    before = after = None
    gates: tuple[Tensor | None, Tensor | None] = (None, None)
    if block.norm_type == "ada_norm_zero":
        modulation = block.norm1
        emb = modulation.emb(timestep, class_labels, hidden_dtype=x.dtype)
        parts = modulation.linear(modulation.silu(emb)).float().chunk(6, dim=1)
        shift, scale, gate, late_shift, late_scale, late_gate = parts
        before, after = (1 + scale, shift), (1 + late_scale, late_shift)
        gates = (gate.contiguous(), late_gate.contiguous())
    first = block.norm1 if before is None else block.norm1.norm
    norms = [layer_norm(first, *before or ()), layer_norm(block.norm3, *after or ())]
    if block.attn2 is not None:
        norms.append(layer_norm(block.norm2))
    y = replayed(block, _layers, x, encoder_hidden_states, norms, gates)
    return y


def _layers(
    block: BasicTransformerBlock,
    x: Tensor,
    context: Tensor | None,
    norms: list[Norm],
    gates: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """A block with its normalizations (attention, feed-forward, cross-attention) and gates computed."""
    x = _attend(block.attn1, x, None, norms[0], gates[0])
    if block.attn2 is not None:
        x = _attend(block.attn2, x, context, norms[2], None)
    return _feed_forward(block.ff, x, norms[1], gates[1])


def mixed_heads(block: Attention, x: Tensor, context: Tensor | None, norm: Norm) -> Tensor:
    """The input of the last layer of ``attention(norm(x), context)``, or of self-attention without a context.

    x: float [B, N, C]; returns the same shape.
    """
    row = block.to_q.clock.row

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (block.heads, -1)).transpose(1, 2)

    query = heads(block.to_q.kernel.run(x, row, norm=norm))
    if context is None:
        key, value = (heads(layer.kernel.run(x, row, norm=norm)) for layer in (block.to_k, block.to_v))
    else:
        key, value = heads(block.to_k(context)), heads(block.to_v(context))
    mixed: Tensor = block.processor.attend(query, key, value, None).transpose(1, 2).flatten(2)
    return mixed


def _attend(block: Attention, x: Tensor, context: Tensor | None, norm: Norm, gate: Tensor | None) -> Tensor:
    """``attention(norm(x), context) * gate + x``."""
    mixed, last = mixed_heads(block, x, context, norm), block.to_out[0]
    y: Tensor = last.kernel.run(mixed, last.clock.row, gate=gate, residual=x, dtype=x.dtype)
    return y


def _feed_forward(block: FeedForward, x: Tensor, norm: Norm, gate: Tensor | None) -> Tensor:
    """``(feed_forward(norm(x))) * gate + x``."""
    inner, last = block.net[0].proj, block.net[2]
    row = inner.clock.row
    hidden = inner.kernel.run(x, row, norm=norm)
    y: Tensor = last.kernel.run(hidden, row, activation=_activation(block), gate=gate, residual=x, dtype=x.dtype)
    return y


def fits_feed_forward(block: FeedForward) -> bool:
    """Whether a feed-forward, of any transformer, has two layers with kernels and an activation that they can fuse."""
    return _activation(block) is not None


@opaque
def feed_forward_forward(block: FeedForward, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``FeedForward.forward``; hidden_states: [B, ..., C]."""
    if not is_unchanged(block):
        return type(block).forward(block, hidden_states, *args, **kwargs)
    inner, last = block.net[0].proj, block.net[2]
    hidden = inner.kernel.run(hidden_states, inner.clock.row)
    y: Tensor = last.kernel.run(hidden, last.clock.row, activation=_activation(block))
    return y


def fits_image(model: Transformer2DModel) -> bool:
    """Whether a transformer has an input and an output projection of an image, as in a UNet, both with kernels."""
    return (
        getattr(model, "is_input_continuous", False)
        and isinstance(model.norm, nn.GroupNorm)
        and is_present(model.norm)
        and is_native(model.proj_in)
        and is_native(model.proj_out)
    )


@opaque
def image_forward(
    model: Transformer2DModel,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    timestep: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    class_labels: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    attention_mask: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    """``Transformer2DModel.forward``; hidden_states: [B, C, H, W]."""
    if attention_mask is not None or encoder_attention_mask is not None or not is_unchanged(model):
        return type(model).forward(
            model, hidden_states, encoder_hidden_states, timestep, added_cond_kwargs, class_labels,
            cross_attention_kwargs, attention_mask, encoder_attention_mask, return_dict,
        )  # fmt: skip
    row = model.proj_in.clock.row
    image = dense(hidden_states, dims=2)
    height, width = image.shape[2:]
    norm = group_norm(image, model.norm)
    tokens = image.permute(0, 2, 3, 1).flatten(1, 2)
    if model.use_linear_projection:
        x = model.proj_in.kernel.run(tokens, row, norm=norm)
    else:
        x = model.proj_in.kernel.run(image, row, norm=norm).permute(0, 2, 3, 1).flatten(1, 2)
    for block in model.transformer_blocks:
        x = block(
            x,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            cross_attention_kwargs=cross_attention_kwargs,
            class_labels=class_labels,
        )
    if model.use_linear_projection:
        y = model.proj_out.kernel.run(x, row, residual=tokens, dtype=hidden_states.dtype)
        y = y.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    else:
        x = x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        y = model.proj_out.kernel.run(x, row, residual=image, dtype=hidden_states.dtype)
    return Transformer2DModelOutput(sample=y) if return_dict else (y,)


def is_plain(block: Attention) -> bool:
    """Whether an attention's four layers have kernels, without normalizations between them."""
    return (
        isinstance(block.processor, QuantizedAttentionProcessor)
        and block.spatial_norm is None
        and block.norm_q is None
        and block.norm_k is None
        and all(is_native(layer) for layer in (block.to_q, block.to_k, block.to_v, block.to_out[0]))
    )


def _fits_attention(block: Any) -> bool:
    return (
        isinstance(block, Attention)
        and is_plain(block)
        and block.group_norm is None
        and not block.norm_cross
        and not block.residual_connection
        and block.rescale_output_factor == 1
        and all(layer.kernel.whole for layer in (block.to_q, block.to_k, block.to_v))
    )


def _activation(block: Any) -> str | None:
    """The activation of a feed-forward whose two layers have kernels, or None."""
    if not isinstance(block, FeedForward) or not (
        is_native(getattr(block.net[0], "proj", None)) and is_native(block.net[2])
    ):
        return None
    first = block.net[0]
    if isinstance(first, GEGLU):
        return "geglu"
    if isinstance(first, GELU):
        return {"none": "gelu", "tanh": "gelu_tanh"}[first.approximate]
    return None
