"""Checks of untrusted configurations before a model is built from them.

A few bytes of JSON can describe a model of a million layers, or tables that fill the memory. What a configuration
describes must not be much larger than the weight files beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from stepquant.checkpoint.format import LARGEST_JSON, read_json
from stepquant.errors import StepquantError

LARGEST_VOCABULARY = 4 * LARGEST_JSON
"""Maximum bytes of a tokenizer file."""
LARGEST_NUMBER = 1 << 24
"""Maximum absolute value of integers in a configuration; the training timesteps become a table of that length."""
LARGEST_GRID = 1 << 29
"""Maximum numbers in a table of position embeddings, which is computed from the configuration and not stored."""
SPARE_PARAMETERS = 1000
SPARE_NUMBERS = 1 << 20


def check_configurations(folder: Path) -> None:
    """Refuse configurations that are too large or too deep, refer to custom code, or contain implausible sizes.

    Raises:
        StepquantError: naming the file.
    """
    for path in sorted(folder.rglob("*.json")):
        if not path.name.endswith(("config.json", "model_index.json")):
            if path.stat().st_size > LARGEST_VOCABULARY:
                raise StepquantError(f"{path} is larger than any file of its kind: the checkpoint is damaged.")
            continue
        config = read_json(path)
        if "auto_map" in config:
            raise StepquantError(f"{path} contains custom code, which is not run.")
        check_numbers(path, config)


def check_numbers(path: Path, config: dict[str, Any]) -> None:
    """Raise `StepquantError` if a configuration contains an implausible size."""
    for number in _integers({name: value for name, value in config.items() if name != "quantization_config"}):
        if abs(number) > LARGEST_NUMBER:
            raise StepquantError(f"{path} holds the number {number}: no model has such a size, it is damaged.")
    sides = [config.get(name) for name in ("sample_size", "pos_embed_max_size")]
    side = max((max(_integers(side), default=0) for side in sides), default=0)
    patch = config.get("patch_size")
    if isinstance(patch, int) and patch > 0:
        width = max(_integers(config.get("num_attention_heads")), default=1)
        width *= max(_integers(config.get("attention_head_dim")), default=1)
        if (side // patch) ** 2 * width > LARGEST_GRID:
            raise StepquantError(f"{path} describes images of {side} x {side}: too large, it is damaged.")


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


@contextmanager
def bounded_by(files: list[Path]) -> Iterator[None]:
    """Limit the parameters of a model that is built in the context to what `files` (safetensors) can hold.

    Raises:
        StepquantError: as soon as the model exceeds that, or if a file cannot be read.
    """
    names = stored = 0
    for path in files:
        stored += path.stat().st_size
        try:
            with safe_open(path, "pt") as file:
                names += len(file.keys())
        except (OSError, SafetensorError) as error:
            raise StepquantError(f"{path} cannot be read ({error}): the checkpoint is damaged.") from None
    parameters, numbers = 2 * names + SPARE_PARAMETERS, 2 * stored + SPARE_NUMBERS  # two 4-bit codes per byte
    thread, seen = threading.get_ident(), [0, 0]

    def count(_module: nn.Module, _name: str, parameter: Tensor | None) -> None:
        if parameter is None or threading.get_ident() != thread:
            return
        seen[0] += 1
        seen[1] += parameter.numel()
        # A model is built more than once while it is loaded, and quantized layers replace others.
        if seen[0] > 4 * parameters or seen[1] > 4 * numbers:
            raise StepquantError(
                "a configuration describes a model far larger than the weights beside it: the checkpoint is damaged."
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _integers(value: Any) -> Iterator[int]:
    """Yield all integers in a JSON value."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, list):
            stack += item
        elif isinstance(item, int) and not isinstance(item, bool):
            yield item
