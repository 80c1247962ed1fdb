"""Components that several families share: tokenizers, text encoders and autoencoders with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from tests.letters import letter_tokenizer

WIDTH = 32
"""Width of every text embedding."""


def image(size: int = 16, seed: int = 0) -> Image.Image:
    """Return an RGB image of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def mask(size: int = 16) -> Image.Image:
    """Return a mask whose left half is white."""
    pixels = np.zeros((size, size), np.uint8)
    pixels[:, : size // 2] = 255
    return Image.fromarray(pixels)


def seeded(build: Any, seed: int = 0, /, **config: Any) -> Any:
    """Return ``build(**config)`` with the weights of `seed`, in evaluation mode.

    Parameters that start at zero, such as gates and learned embeddings, get values too, so that nothing is without
    effect; biases stay.
    """
    torch.manual_seed(seed)
    model = build(**config).eval()
    for name, parameter in model.named_parameters():
        if not name.endswith("bias") and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def tokenizer(*special: str, template: str | None = None, length: int = 16, start: bool = False) -> Any:
    """Return a tokenizer of words, punctuation and line ends: three words are known, the others are ``<unk>``.

    Args:
        special: further special tokens, one id each.
        template: chat template (Jinja).
        length: longest input in tokens.
        start: whether to put ``<s>`` before every text.
    """
    names = ["<pad>", "</s>", "<unk>", "<s>", *special, "a", "red", "bicycle"]
    words = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = Split(Regex(r"\w+|\n|[^\w\s]"), behavior="removed", invert=True)
    if start:
        words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", names.index("<s>"))])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="</s>", bos_token="<s>",
        additional_special_tokens=list(special), model_max_length=length, chat_template=template,
    )  # fmt: skip


def clip(folder: Path, projected: bool = False, length: int = 16) -> tuple[Any, Any]:
    """Return a tokenizer of letters and a CLIP text encoder of two layers, for `length` tokens."""
    folder.mkdir(parents=True)
    letters = letter_tokenizer(folder)
    letters.model_max_length = length
    config = transformers.CLIPTextConfig(
        vocab_size=len(letters), hidden_size=WIDTH, intermediate_size=32, projection_dim=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=length, bos_token_id=letters.bos_token_id,
        eos_token_id=letters.eos_token_id, pad_token_id=letters.pad_token_id,
    )  # fmt: skip
    encoder = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return letters, seeded(encoder, 1, config=config)


def t5(width: int = WIDTH, encoder: Any = transformers.T5EncoderModel) -> tuple[Any, Any]:
    """Return a tokenizer of words and a T5 encoder (or that of another class) of one layer."""
    words = tokenizer()
    config = encoder.config_class(vocab_size=16, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return words, seeded(encoder, 1, config=config)


def clip_vision(width: int = WIDTH, size: int = 16, projected: bool = True) -> tuple[Any, Any]:
    """Return an image processor and a CLIP image encoder of two layers."""
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)
    config = transformers.CLIPVisionConfig(
        hidden_size=width, intermediate_size=32, projection_dim=width, num_hidden_layers=2, num_attention_heads=2,
        image_size=size, patch_size=size // 2,
    )  # fmt: skip
    encoder = transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel
    return processor, seeded(encoder, 1, config=config)


def autoencoder(**config: Any) -> Any:
    """Return an image autoencoder that halves height and width."""
    shape = {
        "sample_size": 16, "block_out_channels": (8, 8), "norm_num_groups": 4,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    return seeded(diffusers.AutoencoderKL, **(shape | config))


def unet(**config: Any) -> Any:
    """Return a Stable Diffusion UNet of two levels."""
    shape = {
        "sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8,
        "cross_attention_dim": WIDTH, "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return seeded(diffusers.UNet2DConditionModel, 2, **(shape | config))


def ddim(**config: Any) -> Any:
    """Return a DDIM scheduler with little noise: a denoiser that is not trained keeps the size of its samples."""
    return diffusers.DDIMScheduler(**({"beta_end": 0.002, "clip_sample": False, "steps_offset": 1} | config))


def flow(**config: Any) -> Any:
    """Return the scheduler of rectified-flow models."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)
