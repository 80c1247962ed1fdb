"""Small pipelines of the families beyond `conftest`, built from config with random weights: real classes, and quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from tests.letters import letter_tokenizer

WIDTH = 16
"""Width of every text embedding."""


def autoencoder(**config: Any) -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        sample_size=16,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        **config,
    )
    return model.eval()


def clip(folder: Path, projected: bool = False) -> tuple[Any, Any]:
    """A tokenizer of letters and a text encoder of one layer."""
    folder.mkdir(parents=True)
    tokenizer = letter_tokenizer(folder)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, projection_dim=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(1)
    return tokenizer, (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5(width: int = WIDTH) -> tuple[Any, Any]:
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "bicycle": 5}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", model_max_length=16
    )
    torch.manual_seed(1)
    config = T5Config(vocab_size=6, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return tokenizer, T5EncoderModel(config).eval()


def unet(**config: Any) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(2)
    shape: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": WIDTH, "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return diffusers.UNet2DConditionModel(**(shape | config)).eval()


class HalvesApart(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A UNet called once per half of classifier-free guidance, as in true-CFG pipelines."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet, self._internal_dict = unet, unet.config

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, **arguments: Any) -> tuple[Any]:
        halves = zip(sample.chunk(2), encoder_hidden_states.chunk(2), strict=True)
        return (torch.cat([self.unet(x, timestep, context, **arguments)[0] for x, context in halves]),)


def sdxl(folder: Path) -> Any:
    """Stable Diffusion XL: pooled text and image sizes as added conditions."""
    tokenizer, text_encoder = clip(folder / "one")
    tokenizer_2, text_encoder_2 = clip(folder / "two", projected=True)
    model = unet(
        cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8, use_linear_projection=True,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=text_encoder, text_encoder_2=text_encoder_2, tokenizer=tokenizer,
        tokenizer_2=tokenizer_2, unet=model, scheduler=diffusers.DDIMScheduler(), add_watermarker=False,
    )  # fmt: skip


def pixart(folder: Path, sized: bool = True) -> Any:
    """PixArt; with image size and aspect ratio as conditions (alpha at 1024) or without (sigma)."""
    torch.manual_seed(2)
    tokenizer, text_encoder = t5()
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        sample_size=128 if sized else 8,  # the pipeline passes the image size only to models of 128
        patch_size=2, cross_attention_dim=24, caption_channels=WIDTH, use_additional_conditions=sized,
    )  # fmt: skip
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=autoencoder(), transformer=transformer.eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )  # fmt: skip


def sd3(folder: Path) -> Any:
    """Stable Diffusion 3: joint attention, the last block without a text stream."""
    torch.manual_seed(2)
    tokenizer, text_encoder = clip(folder / "one", projected=True)
    tokenizer_2, text_encoder_2 = clip(folder / "two", projected=True)
    tokenizer_3, text_encoder_3 = t5(2 * WIDTH)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH, out_channels=4,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(shift_factor=0.0), text_encoder=text_encoder, tokenizer=tokenizer,
        text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
    )  # fmt: skip


def flux(folder: Path, guidance: bool = True) -> Any:
    """Flux, guidance-distilled (dev) or not (schnell): one double block and two single ones."""
    tokenizer, text_encoder = clip(folder / "one")
    tokenizer_2, text_encoder_2 = t5()
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=autoencoder(shift_factor=0.0),
        text_encoder=text_encoder, tokenizer=tokenizer, text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2,
        transformer=flux_transformer(guidance),
    )  # fmt: skip


def flux_transformer(guidance: bool = True) -> Any:
    torch.manual_seed(1)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guidance, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return transformer.eval()


FAMILIES = {
    "SDXL": sdxl,
    "PixArt-alpha": pixart,
    "PixArt-sigma": lambda folder: pixart(folder, sized=False),
    "SD3": sd3,
    "Flux dev": flux,
    "Flux schnell": lambda folder: flux(folder, guidance=False),
}
