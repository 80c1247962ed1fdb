"""Small denoisers of families whose attention stepquant intercepts, with the arguments of one call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from stepquant.calibration.model import insert_fake_quantizers
from stepquant.config import QuantSpec
from stepquant.layers.install import install
from stepquant.models.description import describe
from stepquant.runtime import prepare

Denoiser = tuple[nn.Module, dict[str, Any]]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def positions(count: int, axes: int) -> Tensor:
    return torch.arange(count).float()[:, None].repeat(1, axes)


def wan(image: bool = False) -> Denoiser:
    config = {"image_dim": 16, "added_kv_proj_dim": 24} if image else {}
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32, **config,
    )  # fmt: skip
    call = {
        "hidden_states": normal(1, 4, 2, 4, 4), "timestep": torch.tensor([500]),
        "encoder_hidden_states": normal(1, 5, 16),
    }  # fmt: skip
    return model, call | ({"encoder_hidden_states_image": normal(1, 257, 16)} if image else {})


def flux() -> Denoiser:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 16, 16), "encoder_hidden_states": normal(1, 6, 16),
        "pooled_projections": normal(1, 16), "timestep": torch.tensor([0.5]), "img_ids": positions(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }  # fmt: skip


def flux2() -> Denoiser:
    model = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 16, 16), "encoder_hidden_states": normal(1, 6, 16),
        "timestep": torch.tensor([0.5]), "guidance": torch.tensor([1.0]), "img_ids": positions(16, 4),
        "txt_ids": torch.zeros(6, 4),
    }  # fmt: skip


def qwen_image() -> Denoiser:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(2, 16, 16), "encoder_hidden_states": normal(2, 7, 16),
        "encoder_hidden_states_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]), "timestep": torch.tensor([0.5, 0.5]),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }  # fmt: skip


def ltx() -> Denoiser:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=16,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(2, 2 * 4 * 4, 4), "encoder_hidden_states": normal(2, 6, 16),
        "timestep": torch.tensor([500, 500]), "encoder_attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3]),
        "num_frames": 2, "height": 4, "width": 4,
    }  # fmt: skip


def lumina2() -> Denoiser:
    """Grouped-query heads, and a scale of the scores."""
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=3,
        num_kv_heads=1, multiple_of=2, ffn_dim_multiplier=4.0, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64),
        cap_feat_dim=16,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(2, 4, 8, 8), "timestep": torch.tensor([0.5, 0.5]),
        "encoder_hidden_states": normal(2, 6, 16),
        "encoder_attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]).bool(),
    }  # fmt: skip


def hunyuan_video() -> Denoiser:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 1, 4, 4), "timestep": torch.tensor([500]),
        "encoder_hidden_states": normal(1, 8, 16), "pooled_projections": normal(1, 8),
        "encoder_attention_mask": torch.tensor([[1] * 5 + [0] * 3]), "guidance": torch.tensor([6.0]),
    }  # fmt: skip


def cogvideox() -> Denoiser:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=8, patch_size=2, max_text_seq_length=8,
        use_rotary_positional_embeddings=False,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 2, 4, 8, 8), "timestep": torch.tensor([500]),
        "encoder_hidden_states": normal(1, 8, 8),
    }  # fmt: skip


def auraflow() -> Denoiser:
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 8, 8), "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": normal(1, 6, 16),
    }  # fmt: skip


def chroma() -> Denoiser:
    model = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 16, 16), "encoder_hidden_states": normal(1, 6, 16),
        "timestep": torch.tensor([0.5]), "img_ids": positions(16, 3), "txt_ids": torch.zeros(6, 3),
        "attention_mask": torch.tensor([[1] * 4 + [0] * 2 + [1] * 16]).bool(),
    }  # fmt: skip


def z_image() -> Denoiser:
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return model, {"x": [normal(4, 1, 8, 8)], "t": torch.tensor([0.5]), "cap_feats": [normal(7, 16)]}


def krea2() -> Denoiser:
    """Grouped-query heads through `enable_gqa`."""
    model = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 16, 16), "encoder_hidden_states": normal(1, 6, 3, 16),
        "timestep": torch.tensor([0.5]), "position_ids": positions(22, 3),
        "encoder_attention_mask": torch.tensor([[1] * 4 + [0] * 2]).bool(),
    }  # fmt: skip


def sana() -> Denoiser:
    """Linear attention, and cross-attention."""
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8,
    )  # fmt: skip
    return model, {
        "hidden_states": normal(1, 4, 8, 8), "encoder_hidden_states": normal(1, 6, 16),
        "timestep": torch.tensor([500]), "encoder_attention_mask": torch.tensor([[1] * 4 + [0] * 2]),
    }  # fmt: skip


BUILDERS: dict[str, Callable[[], Denoiser]] = {
    builder.__name__: builder
    for builder in (
        flux, flux2, qwen_image, ltx, lumina2, hunyuan_video, cogvideox, auraflow, chroma, z_image, krea2, sana, wan,
    )
} | {"wan_image": lambda: wan(image=True)}  # fmt: skip


def build(name: str) -> Denoiser:
    """A denoiser with random weights, zero-initialized ones included, in evaluation mode, and its call."""
    torch.manual_seed(0)
    model, call = BUILDERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return model.eval().requires_grad_(False), call


@torch.no_grad()
def quantized(model: nn.Module, call: dict[str, Any]) -> nn.Module:
    """A copy in w8a8, its activations calibrated on one call, executed by the reference runtime."""
    calibrated = insert_fake_quantizers(model, describe(model, call), QuantSpec.parse("w8a8"))
    for point in calibrated.activation_points():
        point.observe()
    calibrated.model(**call)
    for point in calibrated.activation_points():
        point.calibrate("minmax")
    result = copy.deepcopy(model)
    install(result, calibrated.to_quantized())
    prepare(result, "reference")
    return result
