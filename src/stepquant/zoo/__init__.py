"""The reference models that ship with the package, reachable everywhere as ``zoo:NAME``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from stepquant.errors import StepquantError

CLASSIFIERS = {"fashion-ddpm": "fashion-classifier", "fashion-class": "fashion-classifier"}
"""Model -> the feature extractor that was trained on the same data; it lies beside the models, but is no pipeline."""


def folder() -> Path:
    """Where the models lie."""
    return Path(str(files(__name__))) / "models"


def names() -> list[str]:
    """Names of the pipelines, sorted."""
    return sorted(index.parent.name for index in folder().glob("*/model_index.json"))


def path(name: str) -> Path:
    """The diffusers folder of a pipeline; raises `StepquantError` naming those there are."""
    known = names()
    if name not in known:
        raise StepquantError(f"the zoo has no model {name!r}: expected one of {', '.join(known)}.")
    return folder() / name


def card(name: str) -> str:
    """The model card, as Markdown without its YAML header; raises `StepquantError` for an unknown name."""
    text = (path(name) / "README.md").read_text()
    if text.startswith("---\n"):
        text = text.split("\n---\n", 1)[1]
    return text.strip()


def classifier_path(name: str) -> Path | None:
    """The folder of the feature extractor for a pipeline's images, or None where there is none."""
    classifier = CLASSIFIERS.get(name)
    return folder() / classifier if classifier else None
