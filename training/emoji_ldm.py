"""``emoji-ldm``: a text-to-image latent diffusion model of Fluent emoji on coloured backgrounds.

A small Stable Diffusion pipeline; the text encoder is trained together with the denoiser. The prompt is
``NAME on COLOUR``, or ``NAME`` for a white background. Use guidance 5 with 25 or more DDIM steps. The second half of
``prompts.txt`` contains pairs of emoji and colour that were held out of the training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from training import vae
from training.card import card
from training.data import COLOURS, Emoji, captioned, emoji, prompt
from training.diffusion import denoising_loss
from training.loop import arguments, device, export_half, load_ema, plan_from, train
from training.text import build_text_encoder, build_tokenizer, classic_files

DROPPED = 0.1
EXAMPLES = (
    "red apple", "tomato on blue", "panda on green", "shark on teal", "sunflower on purple", "pizza", "tiger", "lemon",
    "strawberry on grey", "fox on blue", "whale on pink", "carrot on black", "soccer ball on green", "tulip",
    "owl", "cherries",
    # held out: emoji and colour were in the training data, but not together
    "penguin on yellow", "octopus on teal", "koala on green", "watermelon on blue", "rose on blue", "elephant on green",
    "trophy on purple", "zebra on orange", "banana on red", "butterfly on grey", "balloon on green", "cactus on grey",
    "pineapple on orange", "doughnut on blue", "hamburger on red", "basketball on teal",
)  # fmt: skip
"""Default prompts for sampling and calibration, one emoji each."""


class TextToNoise(nn.Module):
    """Text encoder and denoiser as one trainable module."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text = build_text_encoder(tokenizer)
        self.unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(48, 96, 160),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(3, 3, 5),  # despite its name this is the number of heads
            cross_attention_dim=self.text.config.hidden_size,
            norm_num_groups=16,
        )

    def forward(self, noisy: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        """Noise of float [B, 4, 16, 16] at int64 timesteps [B], given int64 tokens [B, length]."""
        return self.unet(noisy, timestep, self.text(tokens)[0], return_dict=False)[0]


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def tokenizer_for(data: Emoji, out: Path, init: Path | None) -> CLIPTokenizer:
    """The tokenizer of the run, stored in its folder; a new run uses that of `init`.

    Training breaks ties between equally frequent pairs differently in every process, so it must happen only once.
    """
    folder = out / "tokenizer"
    if folder.is_dir():
        return CLIPTokenizer.from_pretrained(folder)
    if init is not None:
        tokenizer = CLIPTokenizer.from_pretrained(init / "tokenizer")
    else:
        tokenizer = build_tokenizer([prompt(name, colour) for name in data.names for colour in COLOURS])
    tokenizer.save_pretrained(folder)
    return tokenizer


def main() -> None:
    parser = arguments(__doc__ or "", steps=4000, batch=32, learning_rate=1e-3)
    vae.add_argument(parser)
    options = parser.parse_args()
    plan = plan_from(options)
    data = emoji(options.data)
    tokenizer = tokenizer_for(data, options.out, options.init)
    images, prompts = captioned(data)
    autoencoder, latents = vae.prepared("emoji", options.vae, images, options.out / "latents.safetensors")

    def tokens_of(prompts: list[str]) -> Tensor:
        return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    tokens, empty = tokens_of(prompts), tokens_of([""])
    model = TextToNoise(tokenizer).to(device())
    if options.init:
        model.unet.load_state_dict(UNet2DConditionModel.from_pretrained(options.init, subfolder="unet").state_dict())
        model.text.load_state_dict(CLIPTextModel.from_pretrained(options.init, subfolder="text_encoder").state_dict())
    alphas = scheduler().alphas_cumprod

    def loss(_step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (plan.batch,), generator=generator)
        dropped = torch.rand(plan.batch, 1, generator=generator) < DROPPED
        words = torch.where(dropped, empty, tokens[chosen]).to(device())
        return denoising_loss(lambda x, t: model(x, t, words), latents[chosen].to(device()), alphas, generator)

    if not options.export_only:
        train(plan, model, loss)
    if options.export:
        export(autoencoder, tokenizer, options)


def export(autoencoder: nn.Module, tokenizer: CLIPTokenizer, options: argparse.Namespace) -> None:
    """Write the newest EMA weights as a pipeline folder, also while the training runs."""
    model = load_ema(TextToNoise(tokenizer), options.out)
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=model.text,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    files = {
        "README.md": card("emoji-ldm", __doc__ or "", "fluent-emoji", options),
        "prompts.txt": "\n".join(EXAMPLES) + "\n",
        **{f"tokenizer/{name}": content for name, content in classic_files(tokenizer).items()},
    }
    export_half(pipeline, options, files)


if __name__ == "__main__":
    main()
