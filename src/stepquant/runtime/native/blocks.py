"""Fuse the float operations of diffusers' blocks into the integer layers next to them.

    residual block   group normalization, SiLU and quantization in one pass; time embedding, residual and scale when
                     results are stored
    attention        group normalization and quantization in one pass; residual and scale when results are stored
    samplers         nearest-neighbor upsampling and padding in the pass that makes codes
    transformers     see `transformer`

Residual blocks and samplers are fused with the GPU kernels, too.

A fused block keeps its modules and parameters; only `forward` is replaced. Activations between blocks stay float32. In
float16 a step is about a seventh faster, but so many codes round differently that the result is as far from the
simulation as the simulation is from full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from stepquant.layers.kernel import opaque
from stepquant.layers.quantized import QuantizedModule
from stepquant.runtime.native import transformer
from stepquant.runtime.native.fusion import is_unchanged, replace_forward, restore_forward
from stepquant.runtime.native.kernel import is_native
from stepquant.runtime.native.norms import Norm, dense, group_norm, is_present


def fuse(model: nn.Module) -> None:
    """Fuse every supported block of `model`; call it after all layers have their kernels."""
    for module in model.modules():
        for kind, fits, forward in FUSED:
            if isinstance(module, kind) and fits(module):
                replace_forward(module, forward)


def separate(model: nn.Module) -> None:
    """Undo `fuse`, for another runtime."""
    for module in model.modules():
        restore_forward(module)


def _fuses(module: Any) -> bool:
    """Whether `module` is a convolution whose kernel fuses the operations before and after it."""
    return _has_kernel(module) and module.kernel.fuses


def _has_kernel(module: Any) -> bool:
    return isinstance(module, QuantizedModule) and module.kernel is not None


def _fits_resnet(block: ResnetBlock2D) -> bool:
    shortcut = block.conv_shortcut
    return (
        isinstance(block.nonlinearity, nn.SiLU)
        and block.upsample is None
        and block.downsample is None
        and _fuses(block.conv1)
        and _fuses(block.conv2)
        and (shortcut is None or _has_kernel(shortcut))
        and block.norm1.affine
        and is_present(block.norm1)
        and block.norm2.affine
        and is_present(block.norm2)
    )


@opaque
def _resnet(block: ResnetBlock2D, input_tensor: Tensor, temb: Tensor | None, *_args: Any, **_kwargs: Any) -> Tensor:
    """``ResnetBlock2D.forward``; input_tensor: [B, C, H, W], temb: [B, D]."""
    if not is_unchanged(block):
        return type(block).forward(block, input_tensor, temb)
    conv1, shortcut, projection = block.conv1, block.conv_shortcut, block.time_emb_proj
    row = conv1.clock.row
    x, added, scaled = input_tensor, None, None
    if projection is not None and temb is not None:
        if is_native(projection):
            time = projection.kernel.run(
                temb, row, activation=None if block.skip_time_act else "silu", dtype=torch.float32
            )
        else:
            time = projection(temb if block.skip_time_act else block.nonlinearity(temb)).float()
        if block.time_embedding_norm == "scale_shift":
            scaled = time.chunk(2, dim=1)
        else:
            added = time.contiguous()
    norm = conv1.kernel.group_norm(x, block.norm1)
    hidden = conv1.kernel.run(x, row, norm=norm, activation="silu", channel_add=added)
    norm = block.conv2.kernel.group_norm(hidden, block.norm2)
    if scaled is not None:
        scale, shift = 1 + scaled[0], scaled[1]
        norm = Norm(norm.multiply * scale, norm.add * scale + shift)
    residual = x if shortcut is None else shortcut(x)
    return block.conv2.kernel.run(
        hidden,
        row,
        norm=norm,
        activation="silu",
        residual=residual,
        factor=1 / block.output_scale_factor,
        dtype=x.dtype,
    )


def _fits_attention(block: Attention) -> bool:
    """Whether a block is self-attention over an image, as in `UNet2DModel`."""
    return (
        transformer.is_plain(block)
        and block.processor.kernel is not None
        and block.group_norm is not None
        and block.group_norm.affine
        and is_present(block.group_norm)
    )


@opaque
def _attention(
    block: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    """``Attention.forward``; hidden_states [B, C, H, W] is fused, any other runs unfused."""
    masked = args or kwargs.get("attention_mask") is not None
    if hidden_states.dim() != 4 or encoder_hidden_states is not None or masked or not is_unchanged(block):
        return type(block).forward(block, hidden_states, encoder_hidden_states, *args, **kwargs)
    image, last = dense(hidden_states, dims=2), block.to_out[0]
    x = image.permute(0, 2, 3, 1).flatten(1, 2)
    mixed = transformer.mixed_heads(block, x, None, group_norm(image, block.group_norm))
    y = last.kernel.run(
        mixed,
        last.clock.row,
        residual=x if block.residual_connection else None,
        factor=1 / block.rescale_output_factor,
        dtype=hidden_states.dtype,
    )
    return y.unflatten(1, image.shape[2:]).permute(0, 3, 1, 2)


def _fits_upsample(block: Upsample2D) -> bool:
    return block.norm is None and block.interpolate and block.use_conv and block.name == "conv" and _fuses(block.conv)


@opaque
def _upsample(block: Upsample2D, hidden_states: Tensor, output_size: Any = None, *_args: Any, **_kwargs: Any) -> Tensor:
    """``Upsample2D.forward``; `output_size` is given if the output is not exactly twice the input."""
    height, width = hidden_states.shape[2:]
    other_size = output_size is not None and tuple(output_size) != (2 * height, 2 * width)
    if other_size or not is_unchanged(block):
        return Upsample2D.forward(block, hidden_states, output_size)
    return block.conv.kernel.run(hidden_states, block.conv.clock.row, upsample=2)


def _fits_downsample(block: Downsample2D) -> bool:
    return block.norm is None and block.use_conv and _fuses(block.conv)


@opaque
def _downsample(block: Downsample2D, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    """``Downsample2D.forward``, which pads by one pixel below and to the right if its layer does not pad."""
    if not is_unchanged(block):
        return Downsample2D.forward(block, hidden_states)
    return block.conv.kernel.run(hidden_states, block.conv.clock.row, extra=1 if block.padding == 0 else 0)


FUSED: tuple[tuple[type, Callable[[Any], bool], Callable[..., Any]], ...] = (
    (ResnetBlock2D, _fits_resnet, _resnet),
    (Attention, _fits_attention, _attention),
    (Upsample2D, _fits_upsample, _upsample),
    (Downsample2D, _fits_downsample, _downsample),
    (BasicTransformerBlock, transformer.fits_block, transformer.block_forward),
    (FeedForward, transformer.fits_feed_forward, transformer.feed_forward_forward),
    (Transformer2DModel, transformer.fits_image, transformer.image_forward),
)
"""Class of a block, whether a block of it can be fused, and its fused `forward`."""
