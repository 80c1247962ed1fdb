"""The zoo's classifier as an offline substitute for Inception: Frechet distance, and the class of an image.

Its values compare models on the same data set with the same sample count. They are not FID.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stepquant import zoo
from stepquant.evaluation.distribution import GaussianStatistics, frechet_distance
from stepquant.loading import ZOO_PREFIX
from stepquant.zoo.classifier import FashionClassifier

BATCH_SIZE = 64


@dataclass(frozen=True)
class ClassifierProxy:
    """A classifier of the data that a zoo model generates, and the statistics of its features over that data."""

    classifier: FashionClassifier
    data: GaussianStatistics

    @classmethod
    def for_model(cls, model: str) -> ClassifierProxy | None:
        """The proxy for images of `model`, such as ``zoo:fashion-ddpm``; None without a classifier of its data."""
        name = model.removeprefix(ZOO_PREFIX)
        folder = zoo.classifier_path(name) if model.startswith(ZOO_PREFIX) else None
        if folder is None:
            return None
        statistics = GaussianStatistics.load(Path(folder) / "statistics.safetensors")
        return cls(FashionClassifier.from_pretrained(folder), statistics)

    def too_few(self, count: int) -> str | None:
        """Why `count` images have no Frechet distance; None if they have one.

        With no more images than feature dimensions the covariance is singular and the distance far too large.
        """
        dimensions = self.data.mean.shape[0]
        return None if count > dimensions else f"{count} images are too few for features of {dimensions} dimensions"

    def frechet(self, images: Tensor) -> float | None:
        """Frechet distance to the data of images float [N, C, H, W] in [-1, 1]; None for too few of them."""
        if self.too_few(len(images)):
            return None
        return frechet_distance(self._batched(self.classifier.features, images), self.data)

    def agreement(self, images: Tensor, labels: Sequence[int]) -> float:
        """Share of images that the classifier assigns to the requested class."""
        predicted = self._batched(self.classifier, images).argmax(dim=1)
        return float((predicted == torch.tensor(labels)).double().mean())

    @staticmethod
    @torch.no_grad()
    def _batched(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        gray = images.mean(dim=1, keepdim=True)
        return torch.cat([function(part) for part in gray.split(BATCH_SIZE)])
