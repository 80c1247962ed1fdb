"""``fashion-classifier``: a small CNN on Fashion-MNIST, the offline feature extractor for Frechet distances."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.evaluation.distribution import GaussianStatistics
from stepquant.zoo.classifier import FashionClassifier
from training.card import card
from training.data import fashion_mnist, to_float
from training.loop import arguments, autocast, device, load_ema, plan_from, train

NORM_BATCHES = 100
"""Batches for the batch normalization statistics of the averaged weights."""


def main() -> None:
    options = arguments(__doc__ or "", steps=3500, batch=128, learning_rate=3e-3).parse_args()
    plan = plan_from(options)
    model = FashionClassifier().to(device())
    if options.init:
        model.load_state_dict(FashionClassifier.from_pretrained(options.init).state_dict())
    images, labels = fashion_mnist(options.data, "train")

    def loss(_step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(images), (plan.batch,), generator=generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        batch = to_float(images[chosen]).roll(shift, dims=(2, 3)).to(device())
        with autocast():
            logits = model(batch)
        return F.cross_entropy(logits.float(), labels[chosen].to(device()), label_smoothing=0.05)

    if not options.export_only:
        train(plan, model, loss)
    if options.export:
        export(images, options)


@torch.no_grad()
def export(images: Tensor, options: argparse.Namespace) -> None:
    """Write weights, accuracy and the feature statistics of the 10,000 test images."""
    model = load_ema(FashionClassifier(), options.out).train()
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(NORM_BATCHES):
        model(to_float(images[torch.randint(len(images), (256,), generator=generator)]))
    model.save_pretrained(options.export)
    model = FashionClassifier.from_pretrained(options.export)
    tests, labels = fashion_mnist(options.data, "t10k")
    features = torch.cat([model.features(to_float(batch)) for batch in tests.split(500)])
    accuracy = (model.head(features).argmax(1) == labels).float().mean().item()
    GaussianStatistics.of(features).save(options.export / "statistics.safetensors")
    text = card("fashion-classifier", __doc__ or "", "fashion-mnist", options)
    measured = (
        f"\n## Measured\n\n{accuracy:.2%} of the 10,000 test images are classified correctly. "
        "`statistics.safetensors` holds mean and covariance of their features.\n"
    )
    (options.export / "README.md").write_text(text + measured)
    print(f"accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
