"""Metrics beyond those that every evaluation has: each needs a network, or data, that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from stepquant.errors import StepquantError
from stepquant.evaluation.distribution import (
    frechet_distance,
    gaussian_statistics,
    inception_score,
    kernel_distance,
    precision_recall,
)
from stepquant.evaluation.extractors import ClassifierExtractor, EmbeddingExtractor, InceptionExtractor, Lpips
from stepquant.evaluation.features import BATCH_SIZE, FeatureExtractor, FolderPictures, TensorPictures, extract
from stepquant.evaluation.intervals import Estimate, mean_interval
from stepquant.evaluation.proxy import ClassifierProxy
from stepquant.progress import Progress
from stepquant.user_code import load_function

NAMES = {
    "lpips": "LPIPS to full precision; =FILE with AlexNet's weights",
    "dino": "similarity of embeddings to full precision; =FOLDER of a DINO model",
    "clip": "the same with CLIP, and the CLIP score of prompts; =FOLDER of a CLIP model",
    "inception": "FID, sFID, KID, precision, recall and IS, needs --data; =FILE with weights, else downloaded",
    "classifier": "their proxies by the zoo's classifier, needs --data",
    "reward": "a model of people's taste such as ImageReward; =path.py:function(images, prompts) -> scores",
}
"""What can be measured, and what it needs."""
SPLITS = 10
"""Of the Inception score."""
CLIP_SCALE = 100.0


class Figure(BaseModel):
    """One metric of the quantized model.

    Attributes:
        interval: 95 % confidence over images, where there is one (`mean_interval`).
        full_precision: the same of the full-precision images; None for a comparison with them.
        count: images it is from.
        data_count: images of the data it compares with.
        note: what to know before believing it.
    """

    model_config = ConfigDict(frozen=True)

    value: float
    interval: tuple[float, float] | None = None
    full_precision: float | None = None
    count: int
    data_count: int | None = None
    note: str | None = None

    @classmethod
    def of(cls, estimate: Estimate, full_precision: float | None = None) -> Figure:
        return cls(
            value=estimate.value, interval=estimate.interval, count=estimate.count, full_precision=full_precision
        )


@dataclass(frozen=True)
class Judged:
    """What is measured: images float [N, C, H, W] in [-1, 1] of both models, from the same noise and conditions.

    Attributes:
        prompts: of each image; empty for a model without text.
        data: images of the data, for the metrics of distributions.
        cache: folder that keeps features.
    """

    model: str
    images: Tensor
    full_precision: Tensor
    prompts: Sequence[str] = ()
    data: FolderPictures | None = None
    cache: Path | None = None


def check_wanted(wanted: dict[str, str], data: Path | None) -> None:
    """Raise `StepquantError` for a metric that does not exist or lacks what it needs, before anything is drawn."""
    for name, where in wanted.items():
        if name not in NAMES:
            raise StepquantError(f"there is no metric {name!r}: expected one of {', '.join(NAMES)}.")
        if name in ("inception", "classifier") and data is None:
            raise StepquantError(f"metric {name} compares with the data: give a folder of its images with --data.")
        if name not in ("inception", "classifier") and not where:
            raise StepquantError(f"metric {name} needs a path: {NAMES[name].partition('; ')[2]}.")
        if name == "reward":
            load_function(where, "reward")
        elif where and not Path(where).exists():
            raise StepquantError(f"there is nothing at {where}: metric {name} needs {NAMES[name].partition('; =')[2]}.")


def measure(wanted: dict[str, str], judged: Judged, progress: Progress | None = None) -> dict[str, Figure]:
    """The wanted metrics, name -> figure; `wanted` is the name of each -> its path, or "".

    Raises:
        StepquantError: for missing or damaged weights, too few images, or data of another size.
    """
    figures: dict[str, Figure] = {}
    for name, where in wanted.items():
        if name == "lpips":
            network = Lpips(Path(where))
            pairs = zip(judged.images.split(BATCH_SIZE), judged.full_precision.split(BATCH_SIZE), strict=True)
            figures["lpips"] = Figure.of(mean_interval(torch.cat([network(*pair) for pair in pairs])))
        elif name in ("dino", "clip"):
            figures |= _embeddings(name, EmbeddingExtractor(Path(where)), judged, progress)
        elif name == "reward":
            figures["reward"] = _reward(where, judged)
        else:
            figures |= _distributions(name, _distribution_extractor(name, where, judged.model), judged, progress)
    return figures


def _embeddings(
    name: str, extractor: EmbeddingExtractor, judged: Judged, progress: Progress | None
) -> dict[str, Figure]:
    ours, theirs = (
        extract(extractor, TensorPictures(images), judged.cache, progress)["embedding"]
        for images in (judged.images, judged.full_precision)
    )
    figures = {f"{name}_similarity": Figure.of(mean_interval((ours * theirs).sum(dim=1)))}
    if name == "clip" and judged.prompts:
        scores, full = (clip_scores(embedding, extractor.texts(judged.prompts)) for embedding in (ours, theirs))
        figures["clip_score"] = Figure.of(mean_interval(scores), float(full.mean()))
    return figures


def clip_scores(images: Tensor, prompts: Tensor) -> Tensor:
    """``max(100 cos, 0)`` of each image's and its prompt's embedding, [N] (arXiv 2104.08718 with w = 100).

    Traps: depends on which CLIP; the paper's own w is 2.5; saturates with good models, whose order it does not tell.
    """
    return (CLIP_SCALE * torch.cosine_similarity(images, prompts, dim=1)).clamp(min=0)


def _reward(where: str, judged: Judged) -> Figure:
    function = load_function(where, "reward")
    ours, theirs = (
        torch.as_tensor(function(images, list(judged.prompts))).double().flatten()
        for images in (judged.images, judged.full_precision)
    )
    if len(ours) != len(judged.images):
        raise StepquantError(f"{where} returned {len(ours)} scores for {len(judged.images)} images.")
    return Figure.of(mean_interval(ours), float(theirs.mean()))


def _distribution_extractor(name: str, where: str, model: str) -> FeatureExtractor:
    if name == "inception":
        return InceptionExtractor(Path(where) if where else None)
    proxy = ClassifierProxy.of(model)
    if proxy is None:
        raise StepquantError(f"there is no classifier for the data of {model}: it knows that of the zoo's models.")
    return ClassifierExtractor(proxy)


def _distributions(
    name: str, extractor: FeatureExtractor, judged: Judged, progress: Progress | None
) -> dict[str, Figure]:
    assert judged.data is not None, "checked at the door"
    data = extract(extractor, judged.data, judged.cache, progress, "Features of the data")
    sides = [
        extract(extractor, TensorPictures(images), judged.cache, progress)
        for images in (judged.images, judged.full_precision)
    ]
    standard = name == "inception"
    named = {
        "frechet": "fid" if standard else "classifier_frechet",
        "spatial": "sfid",
        "kernel": "kid" if standard else "classifier_kernel_distance",
        "precision": "precision" if standard else "classifier_precision",
        "recall": "recall" if standard else "classifier_recall",
        "score": "inception_score" if standard else "classifier_score",
    }
    values = [_of_one(side, data) for side in sides]
    count, data_count, dimensions = len(judged.images), len(judged.data), data["pool"].shape[1]
    few = min(count, data_count) <= dimensions
    bias = f"biased upwards by far: fewer images than the {dimensions} dimensions of the features" if few else None
    figures = {}
    for key, label in named.items():
        if key not in values[0]:
            continue
        figures[label] = Figure(
            value=values[0][key],
            full_precision=values[1][key],
            count=count,
            data_count=None if key == "score" else data_count,
            note=bias if key in ("frechet", "spatial") else None,
        )
    return figures


def _of_one(side: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, float]:
    precision, recall = precision_recall(side["pool"], data["pool"])
    values = {
        "frechet": frechet_distance(gaussian_statistics(side["pool"]), gaussian_statistics(data["pool"])),
        "kernel": kernel_distance(side["pool"], data["pool"]),
        "precision": precision,
        "recall": recall,
        "score": inception_score(side["logits"], SPLITS),
    }
    if "spatial" in side:
        spatial = gaussian_statistics(side["spatial"]), gaussian_statistics(data["spatial"])
        values["spatial"] = frechet_distance(*spatial)
    return values
