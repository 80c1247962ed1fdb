"""Transformers that generate images from the embeddings of CLIP and T5: PixArt to HiDream."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests.families.family import Family
from tests.families.parts import WIDTH, autoencoder, clip, flow, image, mask, seeded, t5, tokenizer

SIZE = {"height": 16, "width": 16}
SHORT = {"max_sequence_length": 8}


def pixart(pipeline: str, sized: bool) -> Any:
    """Return a function that builds PixArt; with image size and aspect ratio as conditions (alpha) or without."""

    def build(folder: Path) -> Any:
        words, text_encoder = t5()
        transformer = seeded(
            diffusers.PixArtTransformer2DModel, 2, num_attention_heads=2, attention_head_dim=24, in_channels=4,
            out_channels=8, num_layers=2, sample_size=128 if sized else 8, patch_size=2, cross_attention_dim=48,
            caption_channels=WIDTH, use_additional_conditions=sized,  # the pipeline passes sizes only to models of 128
        )  # fmt: skip
        return getattr(diffusers, pipeline)(
            tokenizer=words, text_encoder=text_encoder, vae=autoencoder(), transformer=transformer,
            scheduler=diffusers.DPMSolverMultistepScheduler(),
        )  # fmt: skip

    return build


def sd3(folder: Path, pipeline: str = "StableDiffusion3Pipeline", **more: Any) -> Any:
    """Joint attention, the first block with a second attention, the last without a text stream."""
    tokenizer_1, text_encoder = clip(folder / "one", projected=True)
    tokenizer_2, text_encoder_2 = clip(folder / "two", projected=True)
    tokenizer_3, text_encoder_3 = t5(2 * WIDTH)
    transformer = seeded(
        diffusers.SD3Transformer2DModel, 2, sample_size=8, patch_size=2, in_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH, out_channels=4, pos_embed_max_size=8, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )  # fmt: skip
    return getattr(diffusers, pipeline)(
        transformer=transformer, scheduler=flow(), vae=autoencoder(shift_factor=0.0), text_encoder=text_encoder,
        tokenizer=tokenizer_1, text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3, **{name: make() for name, make in more.items()},
    )  # fmt: skip


def filled(model: Any) -> Any:
    """Return a ControlNet with outputs that are not zero."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.startswith("controlnet_"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def sd3_controlnet(folder: Path) -> Any:
    def control() -> Any:
        return filled(
            seeded(
                diffusers.SD3ControlNetModel, 2, sample_size=8, patch_size=2, in_channels=4, num_layers=1,
                attention_head_dim=16, num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=32,
                pooled_projection_dim=2 * WIDTH, out_channels=4, pos_embed_max_size=8, qk_norm="rms_norm",
                dual_attention_layers=(),
            )
        )  # fmt: skip

    return sd3(folder, "StableDiffusion3ControlNetPipeline", controlnet=control)


def flux(pipeline: str = "FluxPipeline", guidance: bool = True, channels: int = 16, **more: Any) -> Any:
    """Return a function that builds FLUX.1: one double block and two single ones."""

    def build(folder: Path) -> Any:
        tokenizer_1, text_encoder = clip(folder / "one")
        tokenizer_2, text_encoder_2 = t5()
        transformer = seeded(
            diffusers.FluxTransformer2DModel, 2, in_channels=channels, out_channels=16, num_layers=1,
            guidance_embeds=guidance, **FLUX,
        )  # fmt: skip
        return getattr(diffusers, pipeline)(
            scheduler=flow(use_dynamic_shifting=guidance), vae=autoencoder(shift_factor=0.0), text_encoder=text_encoder,
            tokenizer=tokenizer_1, text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, transformer=transformer,
            **{name: make() for name, make in more.items()},
        )  # fmt: skip

    return build


FLUX: dict[str, Any] = {
    "patch_size": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip


def flux_controlnet() -> Any:
    model = seeded(diffusers.FluxControlNetModel, 2, in_channels=16, num_layers=1, guidance_embeds=True, **FLUX)
    return filled(model)


def chroma(folder: Path) -> Any:
    """Modulation computed for all blocks at once by a network of the timestep."""
    words, text_encoder = t5()
    transformer = seeded(
        diffusers.ChromaTransformer2DModel, 2, in_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 4, 8),
        approximator_num_channels=32, approximator_hidden_dim=32, approximator_layers=1,
    )  # fmt: skip
    return diffusers.ChromaPipeline(
        scheduler=flow(), vae=autoencoder(shift_factor=0.0), text_encoder=text_encoder, tokenizer=words,
        transformer=transformer,
    )  # fmt: skip


def auraflow(folder: Path) -> Any:
    words, text_encoder = t5(encoder=transformers.UMT5EncoderModel)
    transformer = seeded(
        diffusers.AuraFlowTransformer2DModel, 2, sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH,
        caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(
        tokenizer=words, text_encoder=text_encoder, vae=autoencoder(), transformer=transformer, scheduler=flow()
    )


def hunyuandit(folder: Path) -> Any:
    """BERT and T5, skip connections between blocks, attention pooling of the text."""
    bert = transformers.BertConfig(
        vocab_size=16, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77,
    )  # fmt: skip
    words, text_encoder_2 = t5()
    transformer = seeded(
        diffusers.HunyuanDiT2DModel, 2, sample_size=8, num_layers=2, patch_size=2, attention_head_dim=16,
        num_attention_heads=2, hidden_size=32, mlp_ratio=2.0, in_channels=4, cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH, pooled_projection_dim=16, text_len=77, text_len_t5=256,
        activation_fn="gelu-approximate", use_style_cond_and_image_meta_size=False,
    )  # fmt: skip
    return diffusers.HunyuanDiTPipeline(
        vae=autoencoder(), text_encoder=seeded(transformers.BertModel, 1, config=bert), tokenizer=words,
        text_encoder_2=text_encoder_2, tokenizer_2=words, transformer=transformer, scheduler=diffusers.DDPMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


ONE_LEVEL = {
    "block_out_channels": (8,), "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",),
}  # fmt: skip
"""Autoencoder that keeps height and width: HiDream's pipeline always generates 128 x 128 latents."""


def hidream(folder: Path) -> Any:
    """Four text encoders and feed-forward networks of routed experts."""
    tokenizer_1, text_encoder = clip(folder / "one", projected=True)
    tokenizer_2, text_encoder_2 = clip(folder / "two", projected=True)
    tokenizer_3, text_encoder_3 = t5()
    llama = transformers.LlamaConfig(
        vocab_size=16, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    transformer = seeded(
        diffusers.HiDreamImageTransformer2DModel, 2, patch_size=8, in_channels=4, out_channels=4, num_layers=1,
        num_single_layers=1, attention_head_dim=16, num_attention_heads=2, caption_channels=[WIDTH, WIDTH],
        text_emb_dim=2 * WIDTH, num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(8, 4, 4),
        max_resolution=(128, 128), llama_layers=[0, 1], force_inference_output=True,
    )  # fmt: skip
    return diffusers.HiDreamImagePipeline(
        scheduler=flow(), vae=autoencoder(shift_factor=0.0, **ONE_LEVEL), text_encoder=text_encoder,
        tokenizer=tokenizer_1, text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2,
        text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3,
        text_encoder_4=seeded(transformers.LlamaForCausalLM, 1, config=llama),
        tokenizer_4=tokenizer(), transformer=transformer,
    )  # fmt: skip


def bria(folder: Path) -> Any:
    words, text_encoder = t5()
    transformer = seeded(
        diffusers.BriaTransformer2DModel, 2, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=[0, 8, 8],
    )  # fmt: skip
    return diffusers.BriaPipeline(
        transformer=transformer, scheduler=flow(), vae=autoencoder(shift_factor=0.0), text_encoder=text_encoder,
        tokenizer=words,
    )  # fmt: skip


def cogview3(folder: Path) -> Any:
    words, text_encoder = t5()
    transformer = seeded(
        diffusers.CogView3PlusTransformer2DModel, 2, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, out_channels=4, text_embed_dim=WIDTH, time_embed_dim=16, condition_dim=8,
        pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    return diffusers.CogView3PlusPipeline(
        tokenizer=words, text_encoder=text_encoder, vae=autoencoder(), transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )  # fmt: skip


TEXT = SIZE | SHORT
FAMILIES = {
    "PixArt-alpha": Family(
        pixart("PixArtAlphaPipeline", sized=True), TEXT | {"use_resolution_binning": False, "clean_caption": False}
    ),
    "PixArt-sigma": Family(
        pixart("PixArtSigmaPipeline", sized=False), TEXT | {"use_resolution_binning": False, "clean_caption": False}
    ),
    "Stable Diffusion 3.5": Family(sd3, TEXT),
    "Stable Diffusion 3 ControlNet": Family(sd3_controlnet, TEXT | {"control_image": image()}),
    "FLUX.1 dev": Family(flux(), TEXT),
    "FLUX.1 schnell": Family(flux(guidance=False), TEXT),
    "FLUX.1 Fill": Family(flux("FluxFillPipeline", channels=48), TEXT | {"image": image(), "mask_image": mask()}),
    "FLUX.1 Kontext": Family(
        flux("FluxKontextPipeline"), TEXT | {"image": image(), "max_area": 256, "_auto_resize": False}
    ),
    "FLUX.1 Control": Family(flux("FluxControlPipeline", channels=32), TEXT | {"control_image": image()}),
    "FLUX.1 ControlNet": Family(
        flux("FluxControlNetPipeline", controlnet=flux_controlnet), TEXT | {"control_image": image()}
    ),
    "Chroma": Family(chroma, TEXT),
    "AuraFlow": Family(auraflow, TEXT),
    "HunyuanDiT": Family(hunyuandit, SIZE | {"use_resolution_binning": False}),
    "HiDream": Family(hidream, SHORT),
    "Bria": Family(bria, TEXT),
    "CogView3-Plus": Family(cogview3, TEXT),
}
