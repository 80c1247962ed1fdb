"""Autoencoders of the two latent models: Fashion-MNIST 32x32x1 -> 8x8x4, emoji 64x64x3 -> 16x16x4."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.data import COLOURS, emoji, fashion_mnist, on_colour, to_float
from training.loop import arguments, autocast, device, load_ema, plan_from, train

KL_WEIGHT = 1e-4
PRESETS = {
    "fashion": {"channels": 1, "sample_size": 32, "block_out_channels": (16, 32, 64)},
    "emoji": {"channels": 3, "sample_size": 64, "block_out_channels": (16, 32, 64)},
}


def build(kind: str) -> AutoencoderKL:
    preset = PRESETS[kind]
    channels = preset["channels"]
    return AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=preset["block_out_channels"],
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=preset["sample_size"],
        mid_block_add_attention=False,
    )


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 and squared error, plus L1 of horizontal and vertical differences, which keeps edges sharp."""

    def differences(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.diff(dim=-1), x.diff(dim=-2)

    edges = sum(F.l1_loss(a, b) for a, b in zip(differences(output), differences(target), strict=True))
    return F.l1_loss(output, target) + F.mse_loss(output, target) + edges


def images_of(kind: str, data: Path) -> Callable[[int, torch.Generator], Tensor]:
    """A function ``(batch, generator) -> float32 [batch, C, H, W]`` of training images."""
    if kind == "fashion":
        fashion, _ = fashion_mnist(data, "train")
        return lambda batch, generator: to_float(fashion[torch.randint(len(fashion), (batch,), generator=generator)])
    rgba = emoji(data).rgba
    colours = list(COLOURS)

    def generate(batch: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(rgba), (batch,), generator=generator)
        colour = torch.randint(len(colours), (batch,), generator=generator).tolist()
        return torch.cat([on_colour(rgba[i : i + 1], colours[c]) for i, c in zip(chosen.tolist(), colour, strict=True)])

    return generate


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option for the trained autoencoder of a latent model."""
    parser.add_argument("--vae", type=Path, required=True, help="--out folder of the autoencoder, or an exported model")


@torch.no_grad()
def prepared(kind: str, run: Path, images: Tensor, cache: Path) -> tuple[AutoencoderKL, Tensor]:
    """The trained autoencoder of `run`, and the latents of `images` with zero mean and unit variance per channel.

    The normalization is folded into the two 1x1 convolutions around the latent, so that the scaling factor is 1 and a
    pipeline needs no shift. Delete the file `cache` when the autoencoder has changed.

    Args:
        run: ``--out`` folder of its training, or the folder of an exported pipeline.
        images: float32 [N, C, H, W] in [-1, 1].
        cache: safetensors with ``latents`` [N, 4, h, w], ``mean`` [4] and ``std`` [4].
    """
    trained = (run / "checkpoint.safetensors").exists()
    model = (load_ema(build(kind), run) if trained else AutoencoderKL.from_pretrained(run, subfolder="vae")).to(
        device()
    )
    if not cache.exists():
        raw = torch.cat([model.encode(part.to(device())).latent_dist.mean.cpu() for part in images.split(200)])
        mean, std = raw.mean(dim=(0, 2, 3)), raw.std(dim=(0, 2, 3))
        latents = (raw - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": latents, "mean": mean, "std": std}, cache)
    stored = load_file(cache)
    fold_normalization(model, stored["mean"].to(device()), stored["std"].to(device()))
    return model.cpu(), stored["latents"]


@torch.no_grad()
def fold_normalization(model: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Make `model` encode to ``(z - mean) / std`` and decode from it; `mean` and `std` are float [latent channels]."""
    encode, decode, count = model.quant_conv, model.post_quant_conv, len(mean)
    encode.weight[:count] /= std.view(-1, 1, 1, 1)
    encode.bias[:count] = (encode.bias[:count] - mean) / std
    encode.bias[count:] -= 2 * std.log()  # the second half is the logarithm of the variance
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= std.view(1, -1, 1, 1)
    model.register_to_config(scaling_factor=1.0, force_upcast=False)


def main() -> None:
    parser = arguments(__doc__ or "", steps=2000, batch=16, learning_rate=1.5e-3)
    parser.add_argument("--kind", choices=PRESETS, required=True)
    options = parser.parse_args()
    plan = plan_from(options)
    model = build(options.kind).to(device())
    if options.init:
        model.load_state_dict(AutoencoderKL.from_pretrained(options.init, subfolder="vae").state_dict())
    draw_batch = images_of(options.kind, options.data)

    def loss(_step: int, generator: torch.Generator) -> Tensor:
        target = draw_batch(plan.batch, generator).to(device())
        with autocast():
            posterior = model.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device())
            output = model.decode(posterior.mean + posterior.std * noise).sample
        divergence = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float())
        return reconstruction_loss(output.float(), target) + KL_WEIGHT * divergence.mean()

    train(plan, model, loss)


if __name__ == "__main__":
    main()
