"""Where a quantized model comes from: everything that determines it, and the command that makes it again."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Iterator
from typing import Any

import diffusers
import torch

from stepquant.errors import StepquantError
from stepquant.files import fingerprint
from stepquant.recipes import RECIPES, Context, Recipe, find_recipe
from stepquant.settings import Settings
from stepquant.user_code import is_custom, source_digest, source_file
from stepquant.version import __version__


def record(context: Context, recipe: Recipe, source: str, given: dict[str, Any]) -> dict[str, Any]:
    """What determined a quantization, JSON-able.

    Args:
        source: what the model is called.
        given: of the call: preset, effort, budget, correction, the requested spec, and the prompts.
    """
    kind = type(recipe)
    custom = {"file": source_file(kind), "sha256": source_digest(kind)} if is_custom(kind) else None
    spec, requested = context.spec.model_dump(mode="json"), given["requested"].model_dump(mode="json")
    return {
        "source": source,
        "recipe": recipe.called(),
        "custom_recipe": custom,
        "preset": given["preset"],
        "effort": given["effort"],
        "hyperparameters": plain(recipe),
        "spec": spec,
        "requested_spec": None if requested == spec else requested,
        "budget": given["budget"],
        "correction": given["correction"],
        "calibration": context.calibration.model_dump(mode="json"),
        "data": None if context.images is None else {"folder": context.images.folder.name, "key": context.images.key()},
        "conditions": list(context.request.conditions),
        "prompts_given": given["prompts"] is not None,
        "guidance": context.request.guidance,
        "inputs": fingerprint(context.request.inputs),
        "dtype": str(next(context.denoiser.parameters()).dtype).removeprefix("torch."),
        "device": None if context.device is None else str(context.device),
        "seed": context.seed,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what the integers depend on."""
    return {
        "stepquant": __version__,
        "torch": torch.__version__.partition("+")[0],
        "diffusers": diffusers.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def plain(value: Any) -> Any:
    """Settings as JSON: nested ones as dictionaries, functions and classes by name."""
    if isinstance(value, Settings):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    if value is None or isinstance(value, str | int | float):
        return value
    return getattr(value, "__qualname__", repr(value))


def command(provenance: dict[str, Any]) -> str:
    """The command that makes a quantized model again; or one sentence on what it needs that no command has."""
    if "hyperparameters" not in provenance:
        return "The provenance was written by an older version of stepquant, and does not hold all that is needed."
    if provenance["inputs"]:
        names = ", ".join(provenance["inputs"])
        return f"Made in Python with inputs of the pipeline's call ({names}), which no command has."
    custom = provenance["custom_recipe"]
    if custom is not None and custom["file"] is None:
        return f"Made in Python by the recipe {provenance['recipe']}, which was not defined in a file."
    lines = [" ".join(map(shlex.quote, ["stepquant", *_words(provenance), "--out", "OUT"]))]
    if provenance["prompts_given"]:
        prompts = " ".join(shlex.quote(str(prompt)) for prompt in provenance["conditions"])
        lines.insert(0, f"printf '%s\\n' {prompts} > prompts.txt")
    return "\n".join(lines)


def _words(provenance: dict[str, Any]) -> Iterator[str]:
    recipe, custom, training = provenance["recipe"], provenance["custom_recipe"], provenance["recipe"] == "qat"
    spec = provenance["requested_spec"] or provenance["spec"]
    calibration = provenance["calibration"]
    yield from ("train" if training else "quantize", provenance["source"])
    values = dict(provenance["hyperparameters"])
    if training:
        if provenance["data"] is not None:
            yield from ("--data", provenance["data"]["folder"])
        if values.pop("distill"):
            yield "--distill"
    else:
        yield from ("--recipe", recipe if custom is None else f"{custom['file']}:{recipe}")
        if provenance["preset"] not in (None, "fast"):
            yield from ("--preset", provenance["preset"])
    yield from ("--bits", spec["bits"], "--effort", provenance["effort"])
    for name, value in (calibration | {"trajectories": None}).items():
        if value is not None:
            yield from (f"--{name}", str(value))
    for name, value in values.items():
        if name not in (defaults := _defaults(provenance)) or value != defaults[name]:
            yield from ("--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    for pattern, bits in spec["overrides"].items():
        yield from ("--override", f"{pattern}={bits}")
    if spec["exact_time"]:
        yield "--exact-time"
    if spec["smoothing"] is not None:
        yield "--smoothing" if spec["smoothing"] else "--no-smoothing"
    if provenance["budget"] is not None:
        yield from ("--budget", f"{provenance['budget']:g}bits")
    if provenance["correction"]:
        yield "--correct"
    for name in ("guidance", "device"):
        if provenance[name] is not None:
            yield from (f"--{name}", str(provenance[name]))
    if provenance["dtype"] != "float32":
        yield from ("--dtype", provenance["dtype"])
    for name, other in provenance.get("also", {}).items():
        yield from ("--also", f"{name}={other['bits']}")
    if provenance["prompts_given"]:
        yield from ("--prompts", "prompts.txt")
    yield from ("--seed", str(provenance["seed"]))


def _defaults(provenance: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters that preset and effort give; none of a recipe that is not known here."""
    if provenance["recipe"] not in RECIPES:
        return {}
    try:
        return plain(find_recipe(provenance["recipe"], provenance["preset"], None, provenance["effort"]))
    except StepquantError:
        return {}
