"""``emoji-flow``: a text-to-image rectified flow of Fluent emoji on coloured backgrounds.

A small Stable Diffusion 3 pipeline, with a multimodal transformer. The prompt is ``NAME on COLOUR``, or ``NAME`` for a
white background. Use guidance 4 with 20 or more steps. The second half of ``prompts.txt`` contains pairs of emoji and
colour that were held out of the training.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from training import vae
from training.card import card
from training.data import captioned, emoji
from training.emoji_ldm import EXAMPLES
from training.flow import flow_loss
from training.loop import arguments, device, export_half, load_ema, plan_from, train
from training.text import classic_files

DROPPED = 0.1
EMPTY_TOKENS = 256
"""Tokens of the third text encoder (the pipeline's ``max_sequence_length``), all zero; see `silent_encoder`."""


class EmptyTokensOnce:
    """Joint attention whose last context token stands for `EMPTY_TOKENS` equal ones.

    Equal tokens stay equal in every block, since text has no positions: one key with log(n) added to its score has the
    weight of n. So training costs 17 text tokens, where the pipeline has 272.
    """

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: object
    ) -> tuple[Tensor, Tensor]:
        """Attend from float [B, N, C] and [B, M, C] to both; returns outputs of the same shapes."""

        def heads(x: Tensor, norm: nn.Module) -> Tensor:
            return norm(x.unflatten(-1, (attn.heads, -1)).transpose(1, 2))

        same = nn.Identity()
        image, text = hidden_states, encoder_hidden_states
        query = torch.cat([heads(attn.to_q(image), attn.norm_q), heads(attn.add_q_proj(text), attn.norm_added_q)], 2)
        key = torch.cat([heads(attn.to_k(image), attn.norm_k), heads(attn.add_k_proj(text), attn.norm_added_k)], 2)
        value = torch.cat([heads(attn.to_v(image), same), heads(attn.add_v_proj(text), same)], 2)
        scores = query @ key.transpose(-1, -2) * attn.scale
        scores = scores + F.pad(scores.new_zeros(scores.shape[-1] - 1), (0, 1), value=math.log(EMPTY_TOKENS))
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        from_image, from_text = mixed.split([image.shape[1], text.shape[1]], dim=1)
        return attn.to_out[0](from_image), from_text if attn.context_pre_only else attn.to_add_out(from_text)


class TextToVelocity(nn.Module):
    """Two text encoders and the transformer as one trainable module."""

    def __init__(self, text: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.text = text
        config = text.config.to_dict() | {"hidden_size": 64, "intermediate_size": 128, "projection_dim": 64}
        self.text_2 = CLIPTextModelWithProjection(CLIPTextConfig(**config))
        width = text.config.hidden_size + 64
        self.transformer = SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=8,
            attention_head_dim=32,
            num_attention_heads=5,
            joint_attention_dim=width,
            caption_projection_dim=160,
            pooled_projection_dim=text.config.projection_dim + 64,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        )
        for block in self.transformer.transformer_blocks:  # starts as the identity (adaLN-Zero, arXiv 2212.09748)
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm1_context.linear.weight)
        nn.init.zeros_(self.transformer.norm_out.linear.weight)
        nn.init.zeros_(self.transformer.proj_out.weight)

    def forward(self, noisy: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        """Velocity of float [B, 4, 16, 16] at times [B] in [0, 1000], given int64 tokens [B, length]."""
        texts = [encoder(tokens, output_hidden_states=True) for encoder in (self.text, self.text_2)]
        context = torch.cat([text.hidden_states[-2] for text in texts], -1)
        pooled = torch.cat([text.text_embeds for text in texts], -1)
        context = F.pad(context, (0, 0, 0, 1))
        return self.transformer(noisy, context, pooled, timestep, return_dict=False)[0]


def silent_encoder(vocabulary: int, width: int) -> T5EncoderModel:
    """A T5 encoder whose output is zero, as diffusers has it for a pipeline without one.

    The pipeline cannot be loaded from a folder that has none.
    """
    config = T5Config(vocab_size=vocabulary, d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    encoder = T5EncoderModel(config).eval()
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


def text_of(folder: Path) -> CLIPTextModelWithProjection:
    """The text encoder of ``emoji-ldm`` with a new projection."""
    return CLIPTextModelWithProjection.from_pretrained(folder, subfolder="text_encoder")


def tokenizer_of(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")


def main() -> None:
    parser = arguments(__doc__ or "", steps=8000, batch=48, learning_rate=1e-3)
    vae.add_argument(parser)
    parser.add_argument("--text", type=Path, required=True, help="exported emoji-ldm: tokenizer and first text encoder")
    options = parser.parse_args()
    plan = plan_from(options)
    tokenizer = tokenizer_of(options.text)
    images, prompts = captioned(emoji(options.data))
    autoencoder, latents = vae.prepared("emoji", options.vae, images, options.out / "latents.safetensors")

    def tokens_of(prompts: list[str]) -> Tensor:
        return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    tokens, empty = tokens_of(prompts), tokens_of([""])
    model = TextToVelocity(text_of(options.text)).to(device())
    if options.init:
        model.load_state_dict(pipeline_weights(options.init))
    for block in model.transformer.transformer_blocks:
        block.attn.set_processor(EmptyTokensOnce())

    def loss(_step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (plan.batch,), generator=generator)
        dropped = torch.rand(plan.batch, 1, generator=generator) < DROPPED
        words = torch.where(dropped, empty, tokens[chosen]).to(device())
        return flow_loss(lambda x, t: model(x, t, words), latents[chosen].to(device()), generator)

    if not options.export_only:
        train(plan, model, loss, plain_attention=False)
    if options.export:
        export(autoencoder, tokenizer, options)


def pipeline_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of an exported model, named as in `TextToVelocity`."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    parts = {"text": pipeline.text_encoder, "text_2": pipeline.text_encoder_2, "transformer": pipeline.transformer}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()}


def export(autoencoder: nn.Module, tokenizer: CLIPTokenizer, options: argparse.Namespace) -> None:
    """Write the newest EMA weights as a pipeline folder, also while the training runs."""
    model = load_ema(TextToVelocity(text_of(options.text)), options.out)
    autoencoder.register_to_config(shift_factor=0.0)
    pipeline = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=autoencoder,
        text_encoder=model.text,
        tokenizer=tokenizer,
        text_encoder_2=model.text_2,
        tokenizer_2=tokenizer,
        text_encoder_3=silent_encoder(len(tokenizer), model.transformer.config.joint_attention_dim),
        tokenizer_3=tokenizer,
    )
    classic = classic_files(tokenizer)
    files = {
        "README.md": card("emoji-flow", __doc__ or "", "fluent-emoji", options),
        "prompts.txt": "\n".join(EXAMPLES) + "\n",
        **{
            f"{folder}/{name}": classic[name]
            for folder in ("tokenizer", "tokenizer_2", "tokenizer_3")
            for name in classic
        },
    }
    export_half(pipeline, options, files)


if __name__ == "__main__":
    main()
