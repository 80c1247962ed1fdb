"""The reference models that ship with the package, available as ``zoo:NAME``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from stepquant.errors import StepquantError

CLASSIFIERS = {"fashion-ddpm": "fashion-classifier", "fashion-class": "fashion-classifier"}
"""Model -> feature extractor trained on the same data; it is stored next to the models, but is not a pipeline."""


def folder() -> Path:
    """Return the folder of the models."""
    return Path(str(files(__name__))) / "models"


def names() -> list[str]:
    """Return the names of the pipelines, sorted."""
    return sorted(index.parent.name for index in folder().glob("*/model_index.json"))


def path(name: str) -> Path:
    """Return the diffusers folder of a pipeline; raises `StepquantError` for an unknown name."""
    known = names()
    if name not in known:
        raise StepquantError(f"the zoo has no model {name!r}; expected one of {', '.join(known)}.")
    return folder() / name


def card(name: str) -> str:
    """Return the model card, Markdown without its YAML header; raises `StepquantError` for an unknown name."""
    text = (path(name) / "README.md").read_text(encoding="utf-8")
    if text.startswith("---\n"):
        text = text.split("\n---\n", 1)[1]
    return text.strip()


def classifier_path(name: str) -> Path | None:
    """Return the folder of the feature extractor for a pipeline's images, or None if there is none."""
    classifier = CLASSIFIERS.get(name)
    return folder() / classifier if classifier else None
