"""``fashion-ddpm``: an unconditional pixel DDPM on Fashion-MNIST."""

from __future__ import annotations

import argparse

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

from training.card import card
from training.data import fashion_mnist, to_float
from training.diffusion import denoising_loss
from training.loop import arguments, device, export_half, load_ema, plan_from, train


def build() -> UNet2DModel:
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
        norm_num_groups=8,
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=True)


def main() -> None:
    options = arguments(__doc__ or "", steps=3000, batch=32, learning_rate=8e-4).parse_args()
    plan = plan_from(options)
    model = build().to(device())
    if options.init:
        model.load_state_dict(UNet2DModel.from_pretrained(options.init, subfolder="unet").state_dict())
    images, _ = fashion_mnist(options.data, "train")
    alphas = scheduler().alphas_cumprod

    def loss(_step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(images), (plan.batch,), generator=generator)
        clean = to_float(images[chosen]).to(device())
        return denoising_loss(lambda x, t: model(x, t, return_dict=False)[0], clean, alphas, generator)

    if not options.export_only:
        train(plan, model, loss)
    if options.export:
        export(options)


def export(options: argparse.Namespace) -> None:
    """Write the newest EMA weights as a pipeline folder, also while the training runs."""
    model = load_ema(build(), options.out)
    text = card("fashion-ddpm", __doc__ or "", "fashion-mnist", options)
    export_half(DDIMPipeline(model, scheduler()), options, {"README.md": text})


if __name__ == "__main__":
    main()
