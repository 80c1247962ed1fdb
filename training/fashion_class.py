"""``fashion-class``: a class-conditional latent diffusion transformer (DiT) on Fashion-MNIST.

Use guidance 4 with 50 DDIM steps; the labels are the ten class names.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn

from training import vae
from training.card import card
from training.data import FASHION_CLASSES, fashion_mnist, to_float
from training.diffusion import denoising_loss
from training.loop import arguments, device, export_half, load_ema, plan_from, train

NULL_CLASS = 1000
"""`DiTPipeline` uses this class as the empty condition, so that the embedding tables have 1,001 rows."""
DROPPED = 0.1


def build() -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=8,
        patch_size=1,
        attention_bias=True,
        num_embeds_ada_norm=NULL_CLASS,
    )
    for block in model.transformer_blocks:
        # The loss drops labels, once for the whole network and with the generator of the step.
        block.norm1.emb.class_embedder.dropout_prob = 0.0
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        _zero(block.norm1.linear)  # every block starts as the identity (arXiv 2212.09748, adaLN-Zero)
    _zero(model.proj_out_1)
    _zero(model.proj_out_2)
    return model


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)


def main() -> None:
    parser = arguments(__doc__ or "", steps=2600, batch=32, learning_rate=8e-4)
    vae.add_argument(parser)
    options = parser.parse_args()
    plan = plan_from(options)
    images, labels = fashion_mnist(options.data, "train")
    autoencoder, latents = vae.prepared("fashion", options.vae, to_float(images), options.out / "latents.safetensors")
    model = build().to(device())
    if options.init:
        model.load_state_dict(DiTTransformer2DModel.from_pretrained(options.init, subfolder="transformer").state_dict())
    alphas = scheduler().alphas_cumprod

    def loss(_step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (plan.batch,), generator=generator)
        dropped = torch.rand(plan.batch, generator=generator) < DROPPED
        classes = labels[chosen].masked_fill(dropped, NULL_CLASS).to(device())
        return denoising_loss(
            lambda x, t: model(x, t, classes, return_dict=False)[0], latents[chosen].to(device()), alphas, generator
        )

    if not options.export_only:
        train(plan, model, loss)
    if options.export:
        export(autoencoder, options)


@torch.no_grad()
def export(autoencoder: nn.Module, options: argparse.Namespace) -> None:
    """Write the newest EMA weights as a pipeline folder, also while the training runs."""
    model = load_ema(build(), options.out)
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.embedding_table.weight[len(FASHION_CLASSES) : NULL_CLASS] = 0
    names = dict(enumerate(FASHION_CLASSES))
    pipeline = DiTPipeline(model, autoencoder, scheduler(), id2label=names)
    pipeline.register_to_config(id2label=names)
    text = card("fashion-class", __doc__ or "", "fashion-mnist", options)
    export_half(pipeline, options, {"README.md": text})


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


if __name__ == "__main__":
    main()
