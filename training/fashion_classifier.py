"""``fashion-classifier``: a small convolutional classifier, the offline feature extractor for Frechet distances."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stepquant.evaluation.distribution import gaussian_statistics, save_statistics
from stepquant.zoo.classifier import FashionClassifier
from training import card
from training.data import fashion_mnist, to_float
from training.loop import arguments, autocast, device, plan_from, train


def main() -> None:
    options = arguments(__doc__ or "", steps=3000, batch=128, learning_rate=2e-3).parse_args()
    plan = plan_from(options)
    model = FashionClassifier().to(device())
    pictures, labels = fashion_mnist(options.data, "train")

    def loss(_step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pictures), (plan.batch,), generator=generator)
        shift = torch.randint(-2, 3, (2,), generator=generator).tolist()
        batch = to_float(pictures[chosen]).roll(shift, dims=(2, 3)).to(device())
        with autocast():
            logits = model(batch)
        return F.cross_entropy(logits.float(), labels[chosen].to(device()), label_smoothing=0.05)

    train(plan, model, loss)
    if options.export:
        export(model, options.data, options.export, options)


@torch.no_grad()
def export(model: FashionClassifier, data: Path, folder: Path, options: object) -> None:
    """Write weights, accuracy and the feature statistics of the 10,000 test pictures."""
    pictures, labels = fashion_mnist(data, "t10k")
    batches = [to_float(batch).to(device()) for batch in pictures.split(500)]
    accuracy = (torch.cat([model(batch) for batch in batches]).argmax(1).cpu() == labels).float().mean().item()
    model.save_pretrained(folder)
    model = FashionClassifier.from_pretrained(folder)
    features = torch.cat([model.features(batch.cpu()) for batch in batches])
    save_statistics(gaussian_statistics(features), folder / "statistics.safetensors")
    lines = card.lines("fashion-classifier", __doc__ or "", "fashion-mnist", options)
    lines.append(f"- **Accuracy:** {accuracy:.2%} on the 10,000 test pictures, whose feature statistics are included.")
    (folder / "README.md").write_text("\n".join(lines) + "\n")
    print(f"accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
