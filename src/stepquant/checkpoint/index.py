"""Check the ``model_index.json`` of a pipeline folder before diffusers reads it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import diffusers

from stepquant.checkpoint.format import read_json
from stepquant.errors import StepquantError


def check_index(folder: Path, pipeline_class: type | None = None) -> None:
    """Refuse an index that is damaged, or refers to code outside diffusers and transformers.

    Components may come from diffusers, from one of its pipelines (a safety checker does), or from transformers.

    Args:
        pipeline_class: a class of the user's own that loads the folder.

    Raises:
        StepquantError: for such an index.
    """
    try:
        index = read_json(folder / "model_index.json")
        name = index["_class_name"]
        libraries = {key: value[0] for key, value in index.items() if _is_component(key, value)}
    except (StepquantError, KeyError, TypeError, IndexError, AttributeError):
        raise StepquantError(f"{folder / 'model_index.json'} is damaged: expected the index of a pipeline.") from None
    if pipeline_class is None and not hasattr(diffusers, str(name)):
        raise StepquantError(
            f"{folder} needs the pipeline class {name!r}, which diffusers {diffusers.__version__} lacks; "
            "custom code is not run. If the class is yours, load the folder with "
            f"stepquant.load(folder, pipeline_class={name})."
        )
    for component, library in libraries.items():
        known = library in (None, "diffusers", "transformers") or isinstance(
            getattr(diffusers.pipelines, str(library), None), ModuleType
        )
        if not known or any((folder / component).glob("*.py")):
            raise StepquantError(f"component {component} of {folder} contains custom code, which is not run.")


def _is_component(key: str, value: object) -> bool:
    """Whether an entry is a component's library and class, and not a list of numbers (the text layers of Krea 2)."""
    numbers = isinstance(value, list) and value and all(isinstance(part, int | float) for part in value)
    return isinstance(value, list) and key[0] != "_" and not numbers
