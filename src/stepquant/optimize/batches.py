"""What quantization-aware training learns from: noised images, or the sampler's own trajectories."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.calibration.image_folder import ImageFolder
from stepquant.calibration.samples import CalibrationSet
from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.models.description import main_tensor
from stepquant.pipelines.call import kind_of
from stepquant.pipelines.generate import batches
from stepquant.progress import Progress

DROPPED = 0.1
"""Share of conditions that are left out in training, so that guidance still has an unconditional half."""

READ_AT_ONCE = 16
"""Images encoded at a time."""


@dataclass(frozen=True)
class Batch:
    """One process's part of a batch: inputs of a denoiser at mixed timesteps, and its target output.

    Attributes:
        share: of the whole batch, 0 to 1; 0 if this part is empty.
        arguments: keyword arguments of the denoiser, tensors of B samples each.
        target: float32 [B, ...]; of a denoiser with more output channels (a learned variance) the first are compared.
    """

    arguments: dict[str, Any]
    target: Tensor
    share: float = 1.0


Batches = Callable[[int, torch.Generator, Ranks], Batch]
"""``batches(iteration, generator, ranks)``: the part of this process. All random numbers come from the generator, and a
sample gets the same ones in whichever process it is."""


@dataclass(frozen=True)
class TrajectoryBatches:
    """Distillation without data: the sampler's own inputs, and full precision's answers to them.

    Attributes:
        collected: ``collected(k)`` -> the k-th set of samples, with outputs.
        refresh: iterations that learn from one set before the next is collected; 0 keeps the first.
        size: samples a batch.
    """

    collected: Callable[[int], CalibrationSet]
    refresh: int
    size: int

    def __call__(self, iteration: int, generator: torch.Generator, ranks: Ranks) -> Batch:
        samples = self.collected(iteration // self.refresh if self.refresh else 0)
        chosen = samples.minibatch(self.size, generator)[ranks.share(self.size)]
        return Batch(samples.arguments(chosen), samples.outputs(chosen), len(chosen) / self.size)


@dataclass(frozen=True)
class ImageBatches:
    """Images of a folder, noised at every timestep of training.

    Attributes:
        clean: images or latents of given indices: float32 [B, C, H, W].
        conditions: the denoiser's further arguments for images of given indices; index -1 stands for no condition.
        alphas_cumprod: float32 [T] of the scheduler.
        prediction: what the denoiser predicts: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
        teacher: the full-precision denoiser, to learn its answer instead (distillation); None for the diffusion loss.
        sample_name: the denoiser's argument that takes x_t.
    """

    clean: Callable[[Tensor], Tensor]
    count: int
    conditions: Callable[[Tensor], dict[str, Tensor]]
    alphas_cumprod: Tensor
    prediction: str
    teacher: nn.Module | None
    sample_name: str
    size: int

    @torch.no_grad()
    def __call__(self, iteration: int, generator: torch.Generator, ranks: Ranks) -> Batch:
        """``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise`` (DDPM, arXiv 2006.11239), one t from each of B equal strata."""
        chosen = torch.randint(self.count, (self.size,), generator=generator)
        mine = ranks.share(self.size)
        clean = self.clean(chosen[mine])
        noise = torch.randn(self.size, *clean.shape[1:], generator=generator)[mine]
        steps = len(self.alphas_cumprod)
        strata = (torch.arange(self.size) + torch.rand(self.size, generator=generator)) / self.size
        timestep = (strata * steps).long().clamp(max=steps - 1)[mine]
        alpha = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        arguments = {self.sample_name: alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, "timestep": timestep}
        dropped = torch.rand(self.size, generator=generator) < DROPPED
        arguments |= self.conditions(chosen.masked_fill(dropped, -1)[mine])
        share = len(clean) / self.size
        if self.teacher is not None:
            device = next(self.teacher.parameters()).device
            moved = {name: value.to(device) for name, value in arguments.items()}
            return Batch(arguments, main_tensor(self.teacher(**moved, return_dict=False)).float().cpu(), share)
        targets = {
            "epsilon": noise,
            "v_prediction": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean,
            "sample": clean,
        }
        return Batch(arguments, targets[self.prediction], share)


def image_batches(
    pipeline: Any,
    denoiser: nn.Module,
    images: ImageFolder,
    latents: Callable[[Callable[[], dict[str, Tensor]]], Tensor],
    *,
    size: int,
    distill: bool,
    progress: Progress,
) -> ImageBatches:
    """Batches of `images` for the denoiser of `pipeline`.

    Args:
        latents: keeps what `encode` computes, and returns its tensor; not called for a model of pixels.

    Raises:
        StepquantError: for a pipeline whose noising or conditions are not known here.
    """
    scheduler, name = pipeline.scheduler, type(pipeline).__name__
    alphas = getattr(scheduler, "alphas_cumprod", None)
    prediction = getattr(scheduler.config, "prediction_type", "epsilon")
    if alphas is None or prediction not in ("epsilon", "v_prediction", "sample"):
        raise StepquantError(
            f"{name} noises images in a way that training does not know ({type(scheduler).__name__}): "
            "train it by distillation, without data."
        )
    parameters = inspect.signature(denoiser.forward).parameters
    vae = getattr(pipeline, "vae", None)
    encoded = None if vae is None else latents(lambda: encode(vae, images, progress))

    def clean(chosen: Tensor) -> Tensor:
        return images.read(chosen.tolist()) if encoded is None else encoded[chosen]

    return ImageBatches(
        clean,
        len(images),
        _conditions(pipeline, denoiser, images),
        alphas.detach().float().cpu(),
        prediction,
        denoiser if distill else None,
        next(iter(parameters)),
        size,
    )


@torch.no_grad()
def encode(vae: Any, images: ImageFolder, progress: Progress) -> dict[str, Tensor]:
    """The images as the denoiser sees them: ``latents`` float32 [N, C, h, w], the mean of each one's posterior."""
    scale, shift = vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0
    parts = []
    with progress.task("Encoding images", len(images)) as advance:
        for indices in batches(len(images), READ_AT_ONCE):
            mean = vae.encode(images.read(indices).to(vae.device, vae.dtype)).latent_dist.mean
            parts.append((mean.float().cpu() - shift) * scale)
            advance(len(indices))
    return {"latents": torch.cat(parts)}


def _conditions(pipeline: Any, denoiser: nn.Module, images: ImageFolder) -> Callable[[Tensor], dict[str, Tensor]]:
    kind = kind_of(pipeline)
    if kind == "unconditional":
        return lambda chosen: {}
    if kind == "class":
        labels = torch.tensor([*images.conditions, pipeline.transformer.config.num_embeds_ada_norm])
        return lambda chosen: {"class_labels": labels[chosen]}
    if getattr(pipeline, "tokenizer_2", None) is not None or not _reads_text_alone(denoiser):
        raise StepquantError(
            f"{type(pipeline).__name__} conditions its denoiser on more than a text's embedding, which training on "
            "data does not know: train it by distillation, without data."
        )
    captions = [*map(str, images.conditions), ""]

    def embedded(chosen: Tensor) -> dict[str, Tensor]:
        prompts = [captions[index] for index in chosen.tolist()]
        return {"encoder_hidden_states": pipeline.encode_prompt(prompts, pipeline.device, 1, False)[0].float().cpu()}

    return embedded


def _reads_text_alone(denoiser: nn.Module) -> bool:
    config: Any = denoiser.config
    extra = ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim")
    return type(denoiser).__name__ == "UNet2DConditionModel" and all(config.get(name) is None for name in extra)
