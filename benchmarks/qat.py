"""Quantization-aware training with three kinds of intervals over time: TDQ's generator, static LSQ, and a free table.

All with equal iterations and data. Each line of ``benchmarks/results/qat.jsonl`` is one training: PSNR to full
precision from the same noise and the Frechet distance to the data in classifier features, at 20 and at 10 steps.
Existing lines are skipped, so that the script can be stopped and restarted.

``python -m benchmarks.qat --data DATA`` (see ``training/README.md``); without ``--data``, only by distillation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import stepquant
from stepquant import zoo
from stepquant.evaluation.distribution import GaussianStatistics, frechet_distance
from stepquant.loading import resolve_pipeline
from stepquant.pipelines.generate import generate_many
from stepquant.pipelines.request import make_request
from stepquant.progress import Progress
from stepquant.quality.fidelity import psnr
from stepquant.quiet import silence_libraries
from stepquant.zoo.classifier import FashionClassifier
from training.data import FASHION_CLASSES, fashion_mnist

RESULTS = Path(__file__).parent / "results" / "qat.jsonl"
INTERVALS = ("generator", "static", "table")
CELLS = [
    ("fashion-ddpm", "w4a4", "distillation"),
    ("fashion-class", "w4a4", "distillation"),
    ("fashion-ddpm", "w4a8", "distillation"),
    ("fashion-ddpm", "w4a4", "data"),
    ("fashion-class", "w4a8", "distillation"),
    ("fashion-ddpm", "w3a3", "distillation"),
]
GUIDANCE = {"fashion-class": 4.0}
STEPS = (20, 10)
COMPARED, GENERATED = 16, 64
"""Images for the PSNR, and for the Frechet distance."""

TRAINED_ON = 2000
"""Number of images of the training set."""


class Reference:
    """A full-precision model, its images at each number of steps, and their distance to the data."""

    def __init__(self, model: str, seed: int) -> None:
        self.pipeline = resolve_pipeline(f"zoo:{model}")
        self.guidance, self.seed = GUIDANCE.get(model), seed
        folder = zoo.classifier_path(model)
        assert folder is not None
        self.classifier = FashionClassifier.from_pretrained(folder)
        self.statistics = GaussianStatistics.load(folder / "statistics.safetensors")
        self.images = {steps: self.generate(self.pipeline, steps) for steps in STEPS}

    def generate(self, pipeline: Any, steps: int) -> Tensor:
        request = make_request(pipeline, steps, guidance=self.guidance)
        return generate_many(pipeline, request, GENERATED, self.seed, Progress(), "")

    @torch.no_grad()
    def frechet(self, images: Tensor) -> float:
        return round(frechet_distance(self.classifier.features(images), self.statistics), 2)

    def figures(self, pipeline: Any) -> dict[str, Any]:
        """Metrics by number of steps."""
        figures: dict[str, Any] = {"psnr_db": {}, "frechet_classifier": {}, "frechet_classifier_fp32": {}}
        for steps, full in self.images.items():
            images = self.generate(pipeline, steps)
            figures["psnr_db"][steps] = round(float(psnr(images[:COMPARED], full[:COMPARED]).mean()), 2)
            figures["frechet_classifier"][steps] = self.frechet(images)
            figures["frechet_classifier_fp32"][steps] = self.frechet(full)
        return figures


def write_images(data: Path, folder: Path) -> None:
    """Write the first images of the training set as PNG files, one subfolder per class."""
    images, labels = fashion_mnist(data, "train")
    for index in range(TRAINED_ON):
        path = folder / FASHION_CLASSES[int(labels[index])] / f"{index:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[index, 0].numpy()).save(path)


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def table() -> str:
    """Markdown with one row per training, in the order of `CELLS`."""
    rows = ["| model | bits | learns from | intervals | PSNR 20 steps | 10 steps | Frechet 20 steps | 10 steps | s |"]
    rows.append("|---" * 9 + "|")
    for model, bits, source in CELLS:
        for line in read():
            if [line["model"], line["bits"], line["source"]] == [model, bits, source]:
                figures = [line[name][str(steps)] for name in ("psnr_db", "frechet_classifier") for steps in STEPS]
                cells = [f"`{model}`", bits.upper(), source, line["intervals"], *figures, line["train_seconds"]]
                rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with fashion-mnist/, for training on images")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--models", nargs="+", help="a selection")
    parser.add_argument("--bits", nargs="+", help="a selection")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown")
    options = parser.parse_args()
    if options.table:
        print(table())
        return
    silence_libraries()
    references: dict[tuple[str, int], Reference] = {}
    with tempfile.TemporaryDirectory() as temporary:
        images, cache = Path(temporary) / "images", Path(temporary) / "cache"
        if options.data:
            write_images(options.data, images)
        for seed in options.seeds:
            for model, bits, source in CELLS:
                skipped = (source == "data" and not options.data) or model not in (options.models or [model])
                if skipped or bits not in (options.bits or [bits]):
                    continue
                for intervals in INTERVALS:
                    cell = {"model": model, "bits": bits, "source": source, "intervals": intervals, "seed": seed}
                    cell["iterations"] = options.iterations
                    if any(cell.items() <= line.items() for line in read()):
                        continue
                    if (model, seed) not in references:
                        references[model, seed] = Reference(model, seed)
                    run(cell, references[model, seed], images if source == "data" else None, cache)


def run(cell: dict[str, Any], reference: Reference, images: Path | None, cache: Path) -> None:
    """Train one cell and append its line."""
    start, busy = time.monotonic(), time.process_time()
    quantized = stepquant.train(
        reference.pipeline,
        cell["bits"],
        data=images,
        distill=images is None,
        recipe=stepquant.recipes.QAT(intervals=cell["intervals"], iterations=cell["iterations"]),
        calibration=stepquant.Calibration(samples=128, steps=20, trajectories=64),
        guidance=reference.guidance,
        seed=cell["seed"],
        cache=cache,
    )
    seconds = {"train_seconds": round(time.monotonic() - start), "cpu_seconds": round(time.process_time() - busy)}
    line = cell | reference.figures(quantized) | seconds | {"threads": torch.get_num_threads()}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
