"""``emoji-lcm``: ``emoji-ldm`` distilled to four steps, a latent consistency model (arXiv 2310.04378).

The guidance scale is an input of the network, so that a step is one call; trained for scales from 3 to 9. The prompts
are those of ``emoji-ldm``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from training import vae
from training.card import card
from training.data import captioned, emoji
from training.emoji_ldm import EXAMPLES, scheduler
from training.loop import arguments, autocast, device, export_half, load_ema, plan_from, train
from training.text import classic_files

STRIDE = 20
"""Timesteps between neighbours on a trajectory, of 1000."""
SCALES = (3.0, 9.0)
CONDITION = 64
"""Width of the embedding of the guidance scale."""
HUBER = 1e-2


def student_of(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """A denoiser that also takes the guidance scale, with the teacher's weights and output at first."""
    student = UNet2DConditionModel.from_config(teacher.config, time_cond_proj_dim=CONDITION)
    student.load_state_dict(teacher.state_dict(), strict=False)
    nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


def consistency_scheduler() -> LCMScheduler:
    return LCMScheduler.from_config(scheduler().config, original_inference_steps=1000 // STRIDE)


class Consistency(nn.Module):
    """``f(z, t, words, scale)``: the x_0 that a trajectory through z at t ends in."""

    def __init__(self, student: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = student

    def forward(self, z: Tensor, timestep: Tensor, words: Tensor, scale: Tensor, alpha: Tensor) -> Tensor:
        """float [B, 4, 16, 16] at int64 timesteps [B] with float scales [B]; alpha [B, 1, 1, 1], the signal's share."""
        condition = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scale - 1, CONDITION)
        noise = self.unet(z, timestep, words, timestep_cond=condition.to(z.device), return_dict=False)[0].float()
        clean = (z - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        skip, out = boundary(timestep)
        return skip * z + out * clean


def boundary(timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B, 1, 1, 1] of z and of the predicted x_0 (arXiv 2310.04378, appendix D): f(z, 0) = z."""
    scaled = (timestep.float() * 10).view(-1, 1, 1, 1)
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()


def main() -> None:
    parser = arguments(__doc__ or "", steps=3000, batch=24, learning_rate=3e-4)
    vae.add_argument(parser)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of an exported emoji-ldm")
    options = parser.parse_args()
    plan = plan_from(options)
    teacher = StableDiffusionPipeline.from_pretrained(options.teacher, torch_dtype=torch.float32).to(device())
    images, prompts = captioned(emoji(options.data))
    _, latents = vae.prepared("emoji", options.vae, images, options.out / "latents.safetensors")

    @torch.no_grad()
    def words_of(prompts: list[str]) -> Tensor:
        tokens = teacher.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return torch.cat([teacher.text_encoder(part.to(device()))[0] for part in tokens.split(256)])

    words, empty = words_of(prompts), words_of([""])
    model = Consistency(student_of(teacher.unet)).to(device())
    alphas = torch.cat([scheduler().alphas_cumprod, torch.ones(1)]).to(device())  # alphas[-1] = 1: x_0 itself

    def loss(_step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (plan.batch,), generator=generator)
        clean, context = latents[chosen].to(device()), words[chosen]
        noise = torch.randn(clean.shape, generator=generator).to(device())
        strata = (torch.arange(plan.batch) + torch.rand(plan.batch, generator=generator)) / plan.batch
        later = ((strata * (1000 // STRIDE)).long() + 1) * STRIDE - 1
        scale = SCALES[0] + (SCALES[1] - SCALES[0]) * torch.rand(plan.batch, generator=generator)
        later, scale = later.to(device()), scale.to(device())
        earlier = later - STRIDE
        alpha, alpha_earlier = (alphas[t].view(-1, 1, 1, 1) for t in (later, earlier))
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        with autocast():
            with torch.no_grad():
                both = torch.cat([empty.expand_as(context), context])
                unguided, guided = teacher.unet(noisy.repeat(2, 1, 1, 1), later.repeat(2), both)[0].float().chunk(2)
                guess = unguided + scale.view(-1, 1, 1, 1) * (guided - unguided)
                start = (noisy - (1 - alpha).sqrt() * guess) / alpha.sqrt()
                stepped = alpha_earlier.sqrt() * start + (1 - alpha_earlier).sqrt() * guess  # DDIM
                target = model(stepped, earlier.clamp(min=0), context, scale, alpha_earlier)
                target = torch.where((earlier < 0).view(-1, 1, 1, 1), stepped, target)
            predicted = model(noisy, later, context, scale, alpha)
        return ((predicted - target).square() + HUBER**2).sqrt().mean() - HUBER

    if not options.export_only:
        train(plan, model, loss)
    if options.export:
        export(teacher, options)


def export(teacher: StableDiffusionPipeline, options: argparse.Namespace) -> None:
    """Write the newest EMA weights as a pipeline folder, also while the training runs."""
    model = load_ema(Consistency(student_of(teacher.unet)), options.out)
    pipeline = LatentConsistencyModelPipeline(
        vae=teacher.vae,
        text_encoder=teacher.text_encoder,
        tokenizer=teacher.tokenizer,
        unet=model.unet,
        scheduler=consistency_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    files = {
        "README.md": card("emoji-lcm", __doc__ or "", "fluent-emoji", options),
        "prompts.txt": "\n".join(EXAMPLES) + "\n",
        **{f"tokenizer/{name}": content for name, content in classic_files(teacher.tokenizer).items()},
    }
    export_half(pipeline, options, files)


if __name__ == "__main__":
    main()
