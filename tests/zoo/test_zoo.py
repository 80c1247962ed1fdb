from __future__ import annotations

import pytest
import torch

from stepquant import zoo
from stepquant.errors import StepquantError
from stepquant.evaluation.distribution import GaussianStatistics
from stepquant.loading import resolve_pipeline
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.zoo.classifier import FashionClassifier


def test_an_unknown_name_is_rejected_with_the_known_ones():
    with pytest.raises(StepquantError, match=r"no model 'nope'.*fashion-ddpm"):
        zoo.path("nope")
    with pytest.raises(StepquantError):
        zoo.path("fashion-classifier")  # a feature extractor, not a pipeline


@pytest.mark.parametrize("name", zoo.names())
def test_each_model_generates_and_has_a_card(name):
    pipeline = resolve_pipeline(f"zoo:{name}")
    assert {
        weight.dtype
        for part in pipeline.components.values()
        if hasattr(part, "parameters")
        for weight in part.parameters()
    } == {torch.float32}
    images = generate(pipeline, make_request(pipeline, 2), range(1), 0)
    assert bool(torch.isfinite(images).all())
    assert f"# {name}" in zoo.card(name)
    assert not zoo.card(name).startswith("---")


@pytest.mark.parametrize("name", sorted(zoo.CLASSIFIERS))
def test_each_classifier_matches_its_statistics(name):
    folder = zoo.classifier_path(name)
    features = FashionClassifier.from_pretrained(folder).features(torch.zeros(1, 1, 32, 32))
    statistics = GaussianStatistics.load(folder / "statistics.safetensors")
    assert statistics.mean.shape == features.shape[1:]
    assert statistics.covariance.shape == (features.shape[1],) * 2
    assert zoo.classifier_path("emoji-ldm") is None
