"""Transformers and UNets that generate video: Wan to Stable Video Diffusion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers.pipelines.cosmos import pipeline_cosmos_text2world as cosmos_text2world

from tests.families.family import Family
from tests.families.language import chat_tokenizer, qwen_vl
from tests.families.parts import (
    WIDTH,
    autoencoder,
    clip,
    clip_vision,
    ddim,
    flow,
    image,
    seeded,
    t5,
    tokenizer,
    unet,
)


def size(pixels: int, frames: int) -> dict[str, int]:
    return {"height": pixels, "width": pixels, "num_frames": frames}


SHORT = {"max_sequence_length": 16}


def wan_autoencoder(**config: Any) -> Any:
    """Return a causal autoencoder that divides frames by 4, height and width by 8."""
    return seeded(
        diffusers.AutoencoderKLWan, base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], **config,
    )  # fmt: skip


def wan_transformer(seed: int = 2, **config: Any) -> Any:
    shape = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 16,
        "out_channels": 16, "text_dim": WIDTH, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
    }  # fmt: skip
    return seeded(diffusers.WanTransformer3DModel, seed, **(shape | config))


def wan_text() -> dict[str, Any]:
    words, text_encoder = t5(encoder=transformers.UMT5EncoderModel)
    return {"tokenizer": words, "text_encoder": text_encoder}


def wan(folder: Path) -> Any:
    return diffusers.WanPipeline(
        transformer=wan_transformer(), vae=wan_autoencoder(), scheduler=flow(shift=7.0), **wan_text()
    )


def wan22(folder: Path) -> Any:
    """Two experts: one for the noisy steps, one for the others."""
    return diffusers.WanPipeline(
        transformer=wan_transformer(), transformer_2=wan_transformer(seed=4), vae=wan_autoencoder(), boundary_ratio=0.8,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ), **wan_text(),
    )  # fmt: skip


def wan22_5b(folder: Path) -> Any:
    """One timestep per token."""
    return diffusers.WanPipeline(
        transformer=wan_transformer(), vae=wan_autoencoder(), scheduler=flow(shift=7.0), expand_timesteps=True,
        **wan_text(),
    )  # fmt: skip


def wan_i2v(folder: Path) -> Any:
    """The first frame as further channels, and as tokens of a second cross-attention."""
    processor, image_encoder = clip_vision(projected=False)
    return diffusers.WanImageToVideoPipeline(
        transformer=wan_transformer(in_channels=36, image_dim=WIDTH, added_kv_proj_dim=32), vae=wan_autoencoder(),
        scheduler=flow(shift=7.0), image_processor=processor, image_encoder=image_encoder, **wan_text(),
    )  # fmt: skip


def ltx(folder: Path) -> Any:
    """Sizes and frame rate as numbers among the arguments of the denoiser."""
    words, text_encoder = t5()
    vae = seeded(
        diffusers.AutoencoderKLLTXVideo, latent_channels=8, block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )  # fmt: skip
    transformer = seeded(
        diffusers.LTXVideoTransformer3DModel, 2, in_channels=8, out_channels=8, num_attention_heads=2,
        attention_head_dim=16, cross_attention_dim=32, num_layers=2, caption_channels=WIDTH,
    )  # fmt: skip
    return diffusers.LTXPipeline(
        scheduler=flow(), vae=vae, text_encoder=text_encoder, tokenizer=words, transformer=transformer
    )


def hunyuan_autoencoder() -> Any:
    """Return a causal autoencoder that divides frames by 4, height and width by 8."""
    return seeded(
        diffusers.AutoencoderKLHunyuanVideo, latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1,
        norm_num_groups=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip


def hunyuan_video(folder: Path) -> Any:
    letters, text_encoder_2 = clip(folder / "clip", length=77)
    llama = transformers.LlamaConfig(
        vocab_size=16, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    transformer = seeded(
        diffusers.HunyuanVideoTransformer3DModel, 2, in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1,
        guidance_embeds=True, text_embed_dim=WIDTH, pooled_projection_dim=WIDTH, rope_axes_dim=(4, 4, 8),
    )  # fmt: skip
    return diffusers.HunyuanVideoPipeline(
        text_encoder=seeded(transformers.LlamaModel, 1, config=llama), tokenizer=tokenizer(length=64),
        transformer=transformer, vae=hunyuan_autoencoder(), scheduler=flow(shift=7.0), text_encoder_2=text_encoder_2,
        tokenizer_2=letters,
    )  # fmt: skip


def cogvideo_autoencoder() -> Any:
    return seeded(
        diffusers.AutoencoderKLCogVideoX, latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1,
        norm_num_groups=2, down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip


def cogvideo(pipeline: str, **config: Any) -> Any:
    """Return a function that builds CogVideoX: the latents of all frames as one sequence, behind the text."""

    def build(folder: Path) -> Any:
        words, text_encoder = t5()
        transformer = seeded(
            diffusers.CogVideoXTransformer3DModel, 2, num_attention_heads=2, attention_head_dim=16,
            out_channels=4, time_embed_dim=16, text_embed_dim=WIDTH, num_layers=2, sample_width=2, sample_height=2,
            sample_frames=9, max_text_seq_length=16, **config,
        )  # fmt: skip
        return getattr(diffusers, pipeline)(
            tokenizer=words, text_encoder=text_encoder, vae=cogvideo_autoencoder(), transformer=transformer,
            scheduler=diffusers.CogVideoXDDIMScheduler(),
        )  # fmt: skip

    return build


def mochi(folder: Path) -> Any:
    words, text_encoder = t5()
    transformer = seeded(
        diffusers.MochiTransformer3DModel, 2, patch_size=2, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        pooled_projection_dim=16, in_channels=12, text_embed_dim=WIDTH, time_embed_dim=16, max_sequence_length=16,
    )  # fmt: skip
    vae = seeded(
        diffusers.AutoencoderKLMochi, latent_channels=12, encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5,
    )  # fmt: skip
    return diffusers.MochiPipeline(
        scheduler=flow(), vae=vae, text_encoder=text_encoder, tokenizer=words, transformer=transformer
    )


def allegro(folder: Path) -> Any:
    words, text_encoder = t5()
    transformer = seeded(
        diffusers.AllegroTransformer3DModel, 2, num_attention_heads=2, attention_head_dim=18, in_channels=4,
        out_channels=4, num_layers=2, cross_attention_dim=36, sample_width=8, sample_height=8, sample_frames=8,
        caption_channels=WIDTH,
    )  # fmt: skip
    vae = seeded(
        diffusers.AutoencoderKLAllegro, latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1,
        norm_num_groups=2, down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4,
        temporal_compression_ratio=4,
    )  # fmt: skip
    return diffusers.AllegroPipeline(
        tokenizer=words, text_encoder=text_encoder, vae=vae, transformer=transformer,
        scheduler=diffusers.EulerAncestralDiscreteScheduler(),
    )  # fmt: skip


def latte(folder: Path) -> Any:
    """Blocks that attend within a frame, and blocks that attend over time, each folding the other into the batch."""
    words, text_encoder = t5()
    transformer = seeded(
        diffusers.LatteTransformer3DModel, 2, sample_size=8, num_layers=2, patch_size=2, attention_head_dim=16,
        num_attention_heads=2, caption_channels=WIDTH, in_channels=4, cross_attention_dim=32, out_channels=8,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, video_length=2,
    )  # fmt: skip
    return diffusers.LattePipeline(
        tokenizer=words, text_encoder=text_encoder, vae=autoencoder(), transformer=transformer,
        scheduler=ddim(),
    )  # fmt: skip


class AlwaysSafe:
    """Stands for the safety checker of Cosmos, whose models take tens of gigabytes."""

    def to(self, device: Any) -> None:
        pass

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def cosmos(folder: Path) -> Any:
    """Learnable position embeddings, a padding mask as a further channel, a scheduler with noise levels of its own."""
    cosmos_text2world.CosmosSafetyChecker = AlwaysSafe  # built by the pipeline itself, also when it is loaded
    words, text_encoder = t5()
    transformer = seeded(
        diffusers.CosmosTransformer3DModel, 2, in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, num_layers=2, mlp_ratio=2, text_embed_dim=WIDTH, adaln_lora_dim=4, max_size=(4, 32, 32),
        patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=True, extra_pos_embed_type="learnable",
    )  # fmt: skip
    vae = seeded(
        diffusers.AutoencoderKLCosmos, latent_channels=4, encoder_block_out_channels=(8,) * 4,
        decode_block_out_channels=(8,) * 4, attention_resolutions=(8,), resolution=64, num_layers=2, patch_size=4,
        patch_type="haar", spatial_compression_ratio=4, temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min"
    )
    return diffusers.CosmosTextToWorldPipeline(
        text_encoder=text_encoder, tokenizer=words, transformer=transformer, vae=vae, scheduler=scheduler
    )


def kandinsky5(folder: Path) -> Any:
    """Channels last; conditions of unequal length for the two halves of guidance."""
    letters, text_encoder_2 = clip(folder / "clip", length=77)
    transformer = seeded(
        diffusers.Kandinsky5Transformer3DModel, 2, in_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=32,
        out_visual_dim=4, patch_size=(1, 2, 2), model_dim=32, ff_dim=64, num_text_blocks=1, num_visual_blocks=2,
        axes_dims=(4, 4, 8), visual_cond=False, attention_type="regular",
    )  # fmt: skip
    return diffusers.Kandinsky5T2VPipeline(
        transformer=transformer, vae=hunyuan_autoencoder(), text_encoder=qwen_vl(), tokenizer=chat_tokenizer(),
        text_encoder_2=text_encoder_2, tokenizer_2=letters, scheduler=flow(shift=5.0),
    )  # fmt: skip


def animatediff(folder: Path) -> Any:
    """Stable Diffusion with attention over time between its blocks; frames folded into the batch."""
    letters, text_encoder = clip(folder / "clip")
    motion = seeded(
        diffusers.MotionAdapter, 3, block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=8,
        motion_num_attention_heads=2,
    )  # fmt: skip
    return diffusers.AnimateDiffPipeline(
        vae=autoencoder(), text_encoder=text_encoder, tokenizer=letters, unet=unet(), motion_adapter=motion,
        scheduler=ddim(),
    )  # fmt: skip


def stable_video_diffusion(folder: Path) -> Any:
    """From an image, without text or `batch_size`."""
    processor, image_encoder = clip_vision(size=224)
    denoiser = seeded(
        diffusers.UNetSpatioTemporalConditionModel, 2, block_out_channels=(32, 64), layers_per_block=1, sample_size=8,
        in_channels=8, out_channels=4, cross_attention_dim=WIDTH, num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
    )  # fmt: skip
    vae = seeded(
        diffusers.AutoencoderKLTemporalDecoder, block_out_channels=(32, 32), latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        use_karras_sigmas=True, timestep_type="continuous", sigma_min=0.002, sigma_max=700.0,
    )  # fmt: skip
    return diffusers.StableVideoDiffusionPipeline(
        vae=vae, image_encoder=image_encoder, unet=denoiser, scheduler=scheduler, feature_extractor=processor
    )


FAMILIES = {
    "Wan 2.1": Family(wan, size(16, 9) | SHORT),
    "Wan 2.1 image to video": Family(wan_i2v, size(16, 9) | {"image": image()}, requires=("ftfy",)),
    "Wan 2.2 A14B": Family(wan22, size(16, 9) | SHORT, steps=4, denoisers=("transformer", "transformer_2")),
    "Wan 2.2 5B": Family(wan22_5b, size(16, 9) | SHORT),
    "LTX-Video": Family(ltx, size(32, 9) | SHORT),
    "HunyuanVideo": Family(
        hunyuan_video, size(16, 9) | SHORT | {"prompt_template": {"template": "{}", "crop_start": 0}}
    ),
    "CogVideoX": Family(cogvideo("CogVideoXPipeline", in_channels=4), size(16, 8) | SHORT),
    "CogVideoX image to video": Family(
        cogvideo("CogVideoXImageToVideoPipeline", in_channels=8, use_rotary_positional_embeddings=True,
            use_learned_positional_embeddings=True),
        size(16, 9) | SHORT | {"image": image()},
    ),
    "Mochi": Family(mochi, size(16, 7) | SHORT),
    "Allegro": Family(allegro, size(16, 8) | SHORT | {"clean_caption": False, "output_type": "latent"}),
    "Cosmos": Family(cosmos, size(32, 9) | SHORT, requires=("torchvision",)),
    "Kandinsky 5": Family(kandinsky5, size(16, 5) | SHORT),
    "AnimateDiff": Family(animatediff, size(16, 2), denoisers=("unet",)),
    "Stable Video Diffusion": Family(
        stable_video_diffusion, size(16, 2) | {"image": image(), "decode_chunk_size": 2}, denoisers=("unet",)
    ),
    "Latte": Family(latte, {"height": 16, "width": 16, "video_length": 2, "clean_caption": False}),
}  # fmt: skip
