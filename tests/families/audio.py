"""Denoisers that generate audio, alone or with video: AudioLDM 2 to LTX-2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import transformers
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

from tests.families.family import Family
from tests.families.language import SHAPE
from tests.families.parts import WIDTH, autoencoder, ddim, flow, seeded, t5, tokenizer


def audioldm2(folder: Path) -> Any:
    """CLAP and T5 joined by GPT-2; two cross-attentions per block; a vocoder behind the autoencoder."""
    text = {
        "vocab_size": 16, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "projection_dim": 16, "pad_token_id": 0, "max_position_embeddings": 40,
    }  # fmt: skip
    audio = {
        "spec_size": 8, "window_size": 4, "num_mel_bins": 8, "depths": [1, 1], "num_attention_heads": [1, 1],
        "num_hidden_layers": 2, "hidden_size": 32, "patch_size": 2, "patch_stride": 2, "patch_embeds_hidden_size": 8,
        "projection_dim": 16,
    }  # fmt: skip
    clap = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
    pieces = [(name, 0.0) for name in ("<pad>", "</s>", "<unk>", "▁a", "▁red", "▁bicycle")]
    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=16, n_positions=128, max_new_tokens=8)
    vocoder = transformers.SpeechT5HifiGanConfig(
        model_in_dim=8, sampling_rate=16000, upsample_initial_channel=16, upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3, 7], resblock_dilation_sizes=[[1, 3], [1, 3]],
        normalize_before=False,
    )  # fmt: skip
    denoiser = seeded(
        diffusers.AudioLDM2UNet2DConditionModel, 2, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        sample_size=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=((None, 16, WIDTH),) * 2,
        attention_head_dim=2, transformer_layers_per_block=(1,) * 2,
    )  # fmt: skip
    return diffusers.AudioLDM2Pipeline(
        vae=autoencoder(in_channels=1, out_channels=1), text_encoder=seeded(transformers.ClapModel, 1, config=clap),
        text_encoder_2=t5()[1],
        projection_model=seeded(
            diffusers.AudioLDM2ProjectionModel, 1, text_encoder_dim=16, text_encoder_1_dim=WIDTH, langauge_model_dim=16
        ),
        language_model=seeded(transformers.GPT2LMHeadModel, 1, config=gpt2), tokenizer=roberta(folder),
        tokenizer_2=transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=16),
        feature_extractor=transformers.ClapFeatureExtractor(feature_size=8), unet=denoiser,
        scheduler=ddim(),
        vocoder=seeded(transformers.SpeechT5HifiGan, 1, config=vocoder),
    )  # fmt: skip


def roberta(folder: Path) -> Any:
    """Return RoBERTa's tokenizer, whose class the pipeline of AudioLDM 2 asks for, with a vocabulary of letters."""
    names = ["<pad>", "</s>", "<unk>", "<s>", "<mask>", *"abcdeilmnorsty", "Ġ"]
    vocabulary = {name: index for index, name in enumerate(names[:16])}
    return transformers.RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def stable_audio(folder: Path) -> Any:
    """Rotary embeddings as an argument, start and end of the recording as global states; needs torchsde."""
    words, text_encoder = t5()
    transformer = seeded(
        diffusers.StableAudioDiTModel, 2, sample_size=16, in_channels=4, num_layers=2, attention_head_dim=16,
        num_key_value_attention_heads=2, out_channels=4, num_attention_heads=2, cross_attention_dim=32,
        time_proj_dim=16, global_states_input_dim=64, cross_attention_input_dim=WIDTH,
    )  # fmt: skip
    vae = seeded(
        diffusers.AutoencoderOobleck, encoder_hidden_size=8, downsampling_ratios=[2, 4], channel_multiples=[1, 2],
        decoder_channels=8, decoder_input_channels=4, audio_channels=2, sampling_rate=16,
    )  # fmt: skip
    projection = seeded(
        diffusers.StableAudioProjectionModel, 1, text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0,
        max_value=32,
    )  # fmt: skip
    return diffusers.StableAudioPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=words, transformer=transformer, projection_model=projection,
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    )  # fmt: skip


def gemma3() -> Any:
    """Return a Gemma 3 of text and images."""
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=SHAPE | {"model_type": "gemma3_text", "sliding_window": 16}, vision_config=vision,
        mm_tokens_per_image=4, image_token_index=6, boi_token_index=7, eoi_token_index=8,
    )  # fmt: skip
    return seeded(transformers.Gemma3ForConditionalGeneration, 1, config=config)


def ltx2(folder: Path) -> Any:
    """Video and audio in one transformer, each with its own noisy sample, and attention between them."""
    attention = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "num_learnable_registers": None}
    both = {f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in attention.items()}
    connectors = seeded(
        LTX2TextConnectors, 1, caption_channels=WIDTH, text_proj_in_factor=4, connector_rope_base_seq_len=32,
        rope_double_precision=False, rope_type="split", **both,
    )  # fmt: skip
    transformer = seeded(
        diffusers.LTX2VideoTransformer3DModel, 2, in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, cross_attention_dim=32, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=16, audio_cross_attention_dim=32, num_layers=2,
        caption_channels=WIDTH, rope_double_precision=False, rope_type="split",
    )  # fmt: skip
    vae = seeded(
        diffusers.AutoencoderKLLTX2Video, latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,),
        layers_per_block=(1,), decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False), downsample_type=("spatial",),
        upsample_residual=(False,), upsample_factor=(1,), upsample_type=("spatiotemporal",), patch_size=1,
        decoder_causal=False,
    )  # fmt: skip
    audio_vae = seeded(
        diffusers.AutoencoderKLLTX2Audio, base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1,
        in_channels=2, resolution=32, latent_channels=2, norm_type="pixel", causality_axis="height", mel_bins=8,
        mid_block_add_attention=False, sample_rate=16000, mel_hop_length=160, is_causal=True, double_z=True,
    )  # fmt: skip
    vocoder = seeded(
        LTX2Vocoder, 1, in_channels=16, hidden_channels=32, out_channels=2, upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2], resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
    )  # fmt: skip
    return diffusers.LTX2Pipeline(
        scheduler=flow(), vae=vae, audio_vae=audio_vae, text_encoder=gemma3(), tokenizer=tokenizer(length=64),
        connectors=connectors, transformer=transformer, vocoder=vocoder,
    )  # fmt: skip


FAMILIES = {
    "AudioLDM 2": Family(audioldm2, {"audio_length_in_s": 0.05, "max_new_tokens": 8}, denoisers=("unet",)),
    "Stable Audio": Family(stable_audio, {"audio_end_in_s": 4.0}, requires=("torchsde",)),
    "LTX-2": Family(
        ltx2, {"height": 32, "width": 32, "num_frames": 5, "frame_rate": 25.0, "max_sequence_length": 16,
               "stg_scale": 0.0, "modality_scale": 1.0}
    ),
}  # fmt: skip
