"""Optional metrics: each needs a network or data that the user provides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from stepquant.errors import StepquantError
from stepquant.evaluation.distribution import frechet_distance, inception_score, kernel_distance, precision_recall
from stepquant.evaluation.extractors import ClassifierExtractor, EmbeddingExtractor, InceptionExtractor, Lpips
from stepquant.evaluation.features import BATCH_SIZE, DataImages, FeatureExtractor, extract
from stepquant.evaluation.intervals import mean_interval
from stepquant.evaluation.proxy import ClassifierProxy
from stepquant.progress import Progress
from stepquant.user_code import load_function

METRICS = {
    "lpips": "LPIPS to full precision; =FILE with AlexNet's weights",
    "dino": "similarity of embeddings to full precision; =FOLDER of a DINO model",
    "clip": "the same with CLIP, and the CLIP score of prompts; =FOLDER of a CLIP model",
    "inception": "FID, sFID, KID, precision, recall and IS, needs data; =FILE with weights, else downloaded",
    "classifier": "their proxies by the zoo's classifier, needs data",
    "reward": "a model of human preference such as ImageReward; =path.py:function(images, prompts) -> scores",
}
"""Name of a metric -> what it is, and its argument."""
DISTRIBUTIONS = {
    "inception": {
        "frechet": "fid", "spatial": "sfid", "kernel": "kid", "precision": "precision", "recall": "recall",
        "score": "inception_score",
    },
    "classifier": {
        "frechet": "classifier_frechet", "kernel": "classifier_kernel_distance", "precision": "classifier_precision",
        "recall": "classifier_recall", "score": "classifier_score",
    },
}  # fmt: skip
"""Metrics that compare with the data -> kind of distance (`_distances`) -> name of its value."""
SPLITS = 10
"""Splits of the Inception score."""
CLIP_SCALE = 100.0


class MetricValue(BaseModel):
    """One metric of the quantized model.

    Attributes:
        interval: 95 % confidence interval over images, where there is one (`mean_interval`).
        full_precision: the metric of the full-precision images; None for a comparison with them.
        count: number of images.
        data_count: number of images of the data.
        note: limits of the value.
    """

    model_config = ConfigDict(frozen=True)

    value: float
    interval: tuple[float, float] | None = None
    full_precision: float | None = None
    count: int
    data_count: int | None = None
    note: str | None = None

    @classmethod
    def of(cls, values: Tensor, full_precision: float | None = None) -> MetricValue:
        """The mean of one value per image."""
        mean, interval = float(values.double().mean()), mean_interval(values)
        return cls(value=mean, interval=interval, count=len(values), full_precision=full_precision)


@dataclass(frozen=True)
class MetricInputs:
    """Images of both models, float [N, C, H, W] in [-1, 1], from the same noise and conditions.

    Attributes:
        model: the full-precision model, as the user names it.
        prompts: one per image; empty for a model without text.
        data: images of the data, for the metrics of distributions.
        cache: folder for features.
    """

    model: str
    images: Tensor
    full_precision: Tensor
    prompts: Sequence[str] = ()
    data: DataImages | None = None
    cache: Path | None = None


def check_metrics(metrics: dict[str, str], data: Path | None) -> None:
    """Raise `StepquantError` for an unknown metric or a missing argument, before images are generated."""
    for name, argument in metrics.items():
        if name not in METRICS:
            raise StepquantError(f"metric {name!r} does not exist; expected one of {', '.join(METRICS)}.")
        if name in DISTRIBUTIONS and data is None:
            raise StepquantError(f"metric {name} compares with the data; expected a folder of its images as `data`.")
        if name not in DISTRIBUTIONS and not argument:
            raise StepquantError(f"metric {name} has no argument; expected {METRICS[name].partition('; ')[2]}.")
        if name == "reward":
            load_function(argument, "reward")
        elif argument and not Path(argument).exists():
            raise StepquantError(f"{argument} does not exist; expected {METRICS[name].partition('; =')[2]}.")


def measure(metrics: dict[str, str], inputs: MetricInputs, progress: Progress | None = None) -> dict[str, MetricValue]:
    """Compute the metrics: name -> argument, or "" without one.

    Raises:
        StepquantError: for missing or damaged weights, too few images, or data of another size.
    """
    values: dict[str, MetricValue] = {}
    for name, argument in metrics.items():
        if name == "lpips":
            network = Lpips(Path(argument))
            pairs = zip(inputs.images.split(BATCH_SIZE), inputs.full_precision.split(BATCH_SIZE), strict=True)
            values["lpips"] = MetricValue.of(torch.cat([network(*pair) for pair in pairs]))
        elif name in ("dino", "clip"):
            values |= _embeddings(name, EmbeddingExtractor(Path(argument)), inputs, progress)
        elif name == "reward":
            values["reward"] = _reward(argument, inputs)
        else:
            values |= _distributions(name, _distribution_extractor(name, argument, inputs.model), inputs, progress)
    return values


def _embeddings(
    name: str, extractor: EmbeddingExtractor, inputs: MetricInputs, progress: Progress | None
) -> dict[str, MetricValue]:
    quantized, full = (
        extract(extractor, images, inputs.cache, progress)["embedding"]
        for images in (inputs.images, inputs.full_precision)
    )
    values = {f"{name}_similarity": MetricValue.of((quantized * full).sum(dim=1))}
    if name == "clip" and inputs.prompts:
        prompts = extractor.texts(inputs.prompts)
        mean = float(clip_scores(full, prompts).mean())
        values["clip_score"] = MetricValue.of(clip_scores(quantized, prompts), mean)
    return values


def clip_scores(images: Tensor, prompts: Tensor) -> Tensor:
    """``max(100 cos, 0)`` of the embeddings of each image and its prompt, [N] (arXiv 2104.08718 with w = 100).

    The score depends on the CLIP model, and good models saturate it. The paper's w is 2.5.
    """
    return (CLIP_SCALE * torch.cosine_similarity(images, prompts, dim=1)).clamp(min=0)


def _reward(location: str, inputs: MetricInputs) -> MetricValue:
    function = load_function(location, "reward")
    quantized, full = (
        torch.as_tensor(function(images, list(inputs.prompts))).double().flatten()
        for images in (inputs.images, inputs.full_precision)
    )
    if len(quantized) != len(inputs.images):
        raise StepquantError(
            f"{location} returned {len(quantized)} scores for {len(inputs.images)} images; expected one per image."
        )
    return MetricValue.of(quantized, float(full.mean()))


def _distribution_extractor(name: str, argument: str, model: str) -> FeatureExtractor:
    if name == "inception":
        return InceptionExtractor(Path(argument) if argument else None)
    proxy = ClassifierProxy.for_model(model)
    if proxy is None:
        raise StepquantError(f"there is no classifier for the data of {model}; expected a zoo model with a classifier.")
    return ClassifierExtractor(proxy)


def _distributions(
    name: str, extractor: FeatureExtractor, inputs: MetricInputs, progress: Progress | None
) -> dict[str, MetricValue]:
    assert inputs.data is not None, "check_metrics requires it"
    data = extract(extractor, inputs.data, inputs.cache, progress, "Features of the data")
    quantized, full = (
        _distances(extract(extractor, images, inputs.cache, progress), data)
        for images in (inputs.images, inputs.full_precision)
    )
    count, data_count, dimensions = len(inputs.images), len(inputs.data), data["pool"].shape[1]
    few = min(count, data_count) <= dimensions
    bias = f"strongly biased upwards: fewer images than the {dimensions} dimensions of the features" if few else None
    return {
        label: MetricValue(
            value=quantized[kind],
            full_precision=full[kind],
            count=count,
            data_count=None if kind == "score" else data_count,
            note=bias if kind in ("frechet", "spatial") else None,
        )
        for kind, label in DISTRIBUTIONS[name].items()
    }


def _distances(images: dict[str, Tensor], data: dict[str, Tensor]) -> dict[str, float]:
    """Kind of distance -> its value, for features by layer; ``spatial`` only where the network has that layer."""
    precision, recall = precision_recall(images["pool"], data["pool"])
    distances = {
        "frechet": frechet_distance(images["pool"], data["pool"]),
        "kernel": kernel_distance(images["pool"], data["pool"]),
        "precision": precision,
        "recall": recall,
        "score": inception_score(images["logits"], SPLITS),
    }
    if "spatial" in images:
        distances["spatial"] = frechet_distance(images["spatial"], data["spatial"])
    return distances
