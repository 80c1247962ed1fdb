"""Transformers that generate images from the hidden states of a language model: FLUX.2 to OmniGen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import transformers

from tests.families.family import Family
from tests.families.language import (
    chat_tokenizer,
    language_model,
    mistral3,
    qwen3_vl,
    qwen_vl,
    qwen_vl_processor,
)
from tests.families.parts import WIDTH, autoencoder, flow, image, seeded, tokenizer

SIZE = {"height": 16, "width": 16}
SHORT = {"max_sequence_length": 8}
TEXT = SIZE | SHORT


def flux2_autoencoder() -> Any:
    """Return an autoencoder that halves height and width, with a normalization of patches of latents."""
    return seeded(
        diffusers.AutoencoderKLFlux2, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
    )  # fmt: skip


def qwen_autoencoder(levels: int = 1) -> Any:
    """Return a causal autoencoder that halves height and width once per level."""
    return seeded(
        diffusers.AutoencoderKLQwenImage, base_dim=4, z_dim=4, dim_mult=[1] * (levels + 1), num_res_blocks=1,
        temperal_downsample=[False] * levels, latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def flux2_transformer(guidance: bool) -> Any:
    return seeded(
        diffusers.Flux2Transformer2DModel, 2, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip


LAYERS = {"text_encoder_out_layers": (1, 2, 3)}


def flux2(folder: Path) -> Any:
    return diffusers.Flux2Pipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=flux2_autoencoder(),
        text_encoder=mistral3(transformers.Mistral3ForConditionalGeneration), tokenizer=chat_tokenizer(),
        transformer=flux2_transformer(guidance=True),
    )  # fmt: skip


def flux2_klein(folder: Path) -> Any:
    return diffusers.Flux2KleinPipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=flux2_autoencoder(),
        text_encoder=language_model(transformers.Qwen3ForCausalLM), tokenizer=chat_tokenizer(),
        transformer=flux2_transformer(guidance=False),
    )  # fmt: skip


def qwen_image(pipeline: str = "QwenImagePipeline", **config: Any) -> Any:
    """Return a function that builds Qwen-Image: prompts of unequal length, image shapes as a list of tuples."""

    def build(folder: Path) -> Any:
        transformer = seeded(
            diffusers.QwenImageTransformer2DModel, 2, patch_size=2, in_channels=16, out_channels=4, num_layers=2,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8), **config,
        )  # fmt: skip
        edits = pipeline != "QwenImagePipeline"
        more = {"processor": qwen_vl_processor()} if edits else {}
        return getattr(diffusers, pipeline)(
            scheduler=flow(use_dynamic_shifting=True), vae=qwen_autoencoder(levels=5 if edits else 1),
            text_encoder=qwen_vl(), tokenizer=chat_tokenizer(), transformer=transformer, **more,
        )  # fmt: skip

    return build


def z_image(folder: Path) -> Any:
    """Samples, captions and outputs as lists of tensors; the timestep's argument is named ``t``."""
    transformer = seeded(
        diffusers.ZImageTransformer2DModel, 2, in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=WIDTH, axes_dims=[4, 4, 8], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return diffusers.ZImagePipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=autoencoder(shift_factor=0.0),
        text_encoder=language_model(transformers.Qwen3Model), tokenizer=chat_tokenizer(), transformer=transformer,
    )  # fmt: skip


def deep_autoencoder() -> Any:
    """Return a deep-compression autoencoder."""
    return seeded(
        diffusers.AutoencoderDC, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), downsample_block_type="conv",
        upsample_block_type="interpolate", scaling_factor=0.41407,
    )  # fmt: skip


def sana(pipeline: str, scheduler: Any, **config: Any) -> Any:
    """Return a function that builds Sana: linear attention and convolutions in the feed-forward network."""

    def build(folder: Path) -> Any:
        transformer = seeded(
            diffusers.SanaTransformer2DModel, 2, patch_size=1, in_channels=4, out_channels=4, num_layers=2,
            num_attention_heads=2, attention_head_dim=16, num_cross_attention_heads=2, cross_attention_head_dim=16,
            cross_attention_dim=32, caption_channels=WIDTH, sample_size=8, **config,
        )  # fmt: skip
        return getattr(diffusers, pipeline)(
            tokenizer=tokenizer(), text_encoder=language_model(transformers.Gemma2Model), vae=deep_autoencoder(),
            transformer=transformer, scheduler=scheduler(),
        )  # fmt: skip

    return build


def lumina2(folder: Path) -> Any:
    """Captions and images refined apart, then joined; grouped-query attention."""
    transformer = seeded(
        diffusers.Lumina2Transformer2DModel, 2, sample_size=8, patch_size=2, in_channels=4, hidden_size=32,
        num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=16,
        ffn_dim_multiplier=None, axes_dim_rope=(4, 4, 8), axes_lens=(64, 64, 64), cap_feat_dim=WIDTH,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=flow(), vae=autoencoder(shift_factor=0.0),
        text_encoder=language_model(transformers.Gemma2Model), tokenizer=tokenizer(),
    )  # fmt: skip


def lumina(folder: Path) -> Any:
    transformer = seeded(
        diffusers.LuminaNextDiT2DModel, 2, sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=2,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, ffn_dim_multiplier=None, norm_eps=1e-5,
        learn_sigma=True, qk_norm=True, cross_attention_dim=WIDTH, scaling_factor=1.0,
    )  # fmt: skip
    return diffusers.LuminaPipeline(
        transformer=transformer, scheduler=flow(), vae=autoencoder(),
        text_encoder=language_model(transformers.GemmaModel), tokenizer=tokenizer(start=True),
    )  # fmt: skip


EIGHTH = {
    "block_out_channels": (8,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
"""Autoencoder that divides height and width by 8, which OmniGen's pipeline takes for granted."""


def omnigen(folder: Path) -> Any:
    """A language model that is the denoiser itself; needs torchvision."""
    transformer = seeded(
        diffusers.OmniGenTransformer2DModel, 2, hidden_size=32, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, num_layers=2, in_channels=4, time_step_dim=16, vocab_size=32, pad_token_id=0,
        rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
    )  # fmt: skip
    return diffusers.OmniGenPipeline(
        transformer=transformer, scheduler=flow(invert_sigmas=True, num_train_timesteps=1), vae=autoencoder(**EIGHTH),
        tokenizer=tokenizer(length=256),
    )  # fmt: skip


def ernie_image(folder: Path) -> Any:
    """Blocks whose sequence dimension comes first."""
    transformer = seeded(
        diffusers.ErnieImageTransformer2DModel, 2, hidden_size=32, num_attention_heads=2, num_layers=2,
        ffn_hidden_size=32, in_channels=16, out_channels=16, text_in_dim=WIDTH, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip
    return diffusers.ErnieImagePipeline(
        transformer=transformer, vae=flux2_autoencoder(), text_encoder=mistral3(transformers.Mistral3Model),
        tokenizer=chat_tokenizer(), scheduler=flow(),
    )  # fmt: skip


def krea2(folder: Path) -> Any:
    """Several layers of the text encoder fused by a transformer; grouped-query attention."""
    transformer = seeded(
        diffusers.Krea2Transformer2DModel, 2, in_channels=16, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, intermediate_size=64, timestep_embed_dim=16,
        text_hidden_dim=WIDTH, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=1,
        text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.Krea2Pipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=qwen_autoencoder(), text_encoder=qwen3_vl(),
        tokenizer=chat_tokenizer(), transformer=transformer, text_encoder_select_layers=(1, 3),
    )  # fmt: skip


def cogview4(folder: Path) -> Any:
    transformer = seeded(
        diffusers.CogView4Transformer2DModel, 2, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, out_channels=4, text_embed_dim=WIDTH, time_embed_dim=16, condition_dim=8, sample_size=8,
        rope_axes_dim=(8, 8),
    )  # fmt: skip
    return diffusers.CogView4Pipeline(
        tokenizer=tokenizer(length=64, start=True), text_encoder=language_model(transformers.GlmModel),
        vae=autoencoder(), transformer=transformer,
        scheduler=flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
    )  # fmt: skip


def ovis(folder: Path) -> Any:
    transformer = seeded(
        diffusers.OvisImageTransformer2DModel, 2, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return diffusers.OvisImagePipeline(
        scheduler=flow(), vae=autoencoder(shift_factor=0.0), text_encoder=language_model(transformers.Qwen3Model),
        tokenizer=chat_tokenizer(), transformer=transformer,
    )  # fmt: skip


SANA = {
    "height": 32, "width": 32, "max_sequence_length": 8, "use_resolution_binning": False,
    "complex_human_instruction": None,
}  # fmt: skip
FAMILIES = {
    "FLUX.2 dev": Family(flux2, {"max_sequence_length": 64} | SIZE | LAYERS),
    "FLUX.2 Klein": Family(flux2_klein, {"max_sequence_length": 16} | SIZE | LAYERS),
    "Qwen-Image": Family(qwen_image(), {"negative_prompt": "a", "true_cfg_scale": 2.0} | TEXT),
    "Qwen-Image-Edit": Family(
        qwen_image("QwenImageEditPipeline"),  # it resizes every image to one million pixels
        {"image": image(), "height": 64, "width": 64, "negative_prompt": "a", "true_cfg_scale": 2.0},
        requires=("torchvision",),
    ),
    "Z-Image": Family(z_image, {"max_sequence_length": 16} | SIZE),
    "Sana": Family(
        sana("SanaPipeline", flow),
        SANA,
    ),
    "Sana-Sprint": Family(
        sana("SanaSprintPipeline", diffusers.SCMScheduler, guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        SANA,
    ),
    "Lumina 2": Family(lumina2, {"max_sequence_length": 32, "system_prompt": "a"} | SIZE),
    "Lumina-Next": Family(lumina, TEXT | {"clean_caption": False}),
    "OmniGen": Family(omnigen, {"height": 32, "width": 32}, requires=("torchvision",)),
    "ERNIE-Image": Family(ernie_image, SIZE),
    "Krea 2": Family(krea2, {"max_sequence_length": 16} | SIZE),
    "CogView4": Family(cogview4, {"max_sequence_length": 16} | SIZE),
    "Ovis-Image": Family(ovis, TEXT),
}
