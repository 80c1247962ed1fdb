"""Measure a finished reference model; add the results to its model card and write a grid of samples.

``python -m training.measure fashion-class --models src/stepquant/zoo/models --grid grid.png``
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from stepquant.evaluation.distribution import GaussianStatistics, frechet_distance
from stepquant.zoo.classifier import FashionClassifier
from training.data import FASHION_CLASSES
from training.loop import device

STEPS = 50
HEADING = "\n## Measured\n\n"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=("fashion-ddpm", "fashion-class", "emoji-ldm", "emoji-flow", "emoji-lcm"))
    parser.add_argument("--models", type=Path, required=True, help="folder with the exported models")
    parser.add_argument("--grid", type=Path, required=True, help="PNG to write")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.models / options.name
    pipeline = DiffusionPipeline.from_pretrained(folder).to(device())
    pipeline.set_progress_bar_config(disable=True)
    sentences = []
    for guidance in options.guidance:
        images, labels = sample(pipeline, options.count, guidance, options.seed)
        if options.name.startswith("fashion"):
            sentences += judge(options.models / "fashion-classifier", images, labels, guidance)
    save_grid(images, options.grid)
    card = folder / "README.md"
    text = card.read_text().split(HEADING)[0]
    card.write_text(text + HEADING + "".join(f"- {sentence}\n" for sentence in sentences) if sentences else text)
    print("\n".join(sentences))


def sample(pipeline: DiffusionPipeline, count: int, guidance: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """Images float32 [count, C, H, W] in [0, 1] of 50 DDIM steps, and their labels int64 [count], or None."""
    generator = torch.Generator().manual_seed(seed)
    kind = type(pipeline).__name__
    listed = Path(pipeline.config._name_or_path) / "prompts.txt"
    prompts = listed.read_text().split("\n") if listed.is_file() else []
    labels = torch.arange(count) % len(FASHION_CLASSES)
    parts = []
    for chosen in torch.arange(count).split(50):
        common = {"num_inference_steps": STEPS, "generator": generator, "output_type": "np"}
        if kind == "DiTPipeline":
            result = pipeline(labels[chosen].tolist(), guidance_scale=guidance, **common)
        elif kind == "DDIMPipeline":
            result = pipeline(batch_size=len(chosen), **common)
        else:
            result = pipeline([prompts[i % (len(prompts) - 1)] for i in chosen], guidance_scale=guidance, **common)
        parts.append(torch.from_numpy(result.images).permute(0, 3, 1, 2))
    return torch.cat(parts), labels if kind == "DiTPipeline" else None


def judge(classifier: Path, images: Tensor, labels: Tensor | None, guidance: float) -> list[str]:
    """Metrics of `images` by the Fashion-MNIST classifier, as sentences for the card."""
    model = FashionClassifier.from_pretrained(classifier)
    features = model.features(images * 2 - 1)
    distance = frechet_distance(features, GaussianStatistics.load(classifier / "statistics.safetensors"))
    count = f"{len(images)} samples of {STEPS} DDIM steps"
    scale = "" if labels is None else f" at guidance scale {guidance:g}"
    sentences = [f"Frechet distance in the features of `fashion-classifier`, {count}{scale}: {distance:.2f}."]
    if labels is not None:
        agreement = (model.head(features).argmax(1) == labels).float().mean().item()
        sentences.append(f"`fashion-classifier` recognizes the requested class in {agreement:.1%} of {count}{scale}.")
    return sentences


def save_grid(images: Tensor, path: Path, columns: int = 10, enlarge: int = 2) -> None:
    """The first 100 of `images` as one PNG."""
    shown = images[: min(100, len(images) // columns * columns)].clamp(0, 1)
    channels, size = shown.shape[1], shown.shape[-1]
    rows = shown.reshape(-1, columns, channels, size, size).permute(0, 3, 1, 4, 2)
    array = (rows.reshape(-1, columns * size, channels) * 255).round().byte().numpy()
    image = Image.fromarray(array[..., 0] if channels == 1 else array)
    image.resize((image.width * enlarge, image.height * enlarge), Image.Resampling.NEAREST).save(path)


if __name__ == "__main__":
    main()
