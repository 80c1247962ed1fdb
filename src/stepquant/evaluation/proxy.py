"""The zoo's classifier, offline, as a proxy for what Inception judges elsewhere: distribution, and class of an image.

Its figures compare models on the same data set with the same sample count. They are not FID, and never to be called so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stepquant import zoo
from stepquant.evaluation.distribution import (
    GaussianStatistics,
    frechet_distance,
    gaussian_statistics,
    load_statistics,
)
from stepquant.loading import ZOO_PREFIX
from stepquant.zoo.classifier import FashionClassifier

BATCH_SIZE = 64


@dataclass(frozen=True)
class ClassifierProxy:
    """A classifier of the data that a zoo model draws, and the statistics of its features over that data."""

    classifier: FashionClassifier
    data: GaussianStatistics

    @classmethod
    def of(cls, model: str) -> ClassifierProxy | None:
        """The proxy for images of `model`, as a user names it; None where there is no classifier of its data."""
        name = model.removeprefix(ZOO_PREFIX)
        folder = zoo.classifier_path(name) if model.startswith(ZOO_PREFIX) else None
        if folder is None:
            return None
        return cls(FashionClassifier.from_pretrained(folder), load_statistics(Path(folder) / "statistics.safetensors"))

    def too_few(self, count: int) -> str | None:
        """Why `count` images give no Frechet distance: no more than feature dimensions leave the covariance singular
        and the distance far too large. None where they suffice."""
        dimensions = self.data.mean.shape[0]
        if count > dimensions:
            return None
        return f"{count} images are too few for features of {dimensions} dimensions: draw more"

    def features(self, images: Tensor) -> Tensor:
        """Penultimate features, float32 [N, D], of images [N, C, H, W] in [-1, 1]; colours are averaged to grey."""
        return self._batched(self.classifier.features, images)

    def frechet(self, images: Tensor) -> float | None:
        """Frechet distance of the features to the data's; None for too few images. Biased upwards at small counts."""
        if self.too_few(len(images)):
            return None
        return frechet_distance(gaussian_statistics(self.features(images)), self.data)

    def agreement(self, images: Tensor, labels: Sequence[int]) -> float:
        """Share of images whose class, as the classifier sees it, is the one asked for."""
        seen = self._batched(self.classifier, images).argmax(dim=1)
        return float((seen == torch.tensor(labels)).double().mean())

    @staticmethod
    @torch.no_grad()
    def _batched(function: object, images: Tensor) -> Tensor:
        assert callable(function)
        grey = images.mean(dim=1, keepdim=True)
        return torch.cat([function(part) for part in grey.split(BATCH_SIZE)])
