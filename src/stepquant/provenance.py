"""Where a quantized model comes from: everything that determines it, and the command that makes it again."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch

from stepquant.calibration.placement import device_of
from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.files import fingerprint
from stepquant.recipes import QAT, RECIPES, Context, Recipe, find_recipe
from stepquant.settings import Settings
from stepquant.user_code import is_custom, source_digest, source_file
from stepquant.version import __version__

SPEC_OPTIONS = ("bits", "overrides", "exact_time", "smoothing", "activations", "group_size", "step_bits")
"""Attributes of a spec that the command line has options for."""
DEFAULTS = {"preset": "fast", "effort": "standard", "dtype": "float32", "seed": 0}
"""Of options that need not be written."""


def record(context: Context, recipe: Recipe, source: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """What determined a quantization, JSON-able; without what was left out.

    Args:
        source: what the model is called; None: its hub id, or the name of its folder.
        given: of the call: preset, effort, budget, correction, the requested spec, the specs of all denoisers if there
            are several, and the prompts.
    """
    kind, images = type(recipe), context.images
    custom = {"name": kind.__qualname__, "file": source_file(kind), "sha256": source_digest(kind)}
    spec, requested = context.spec.model_dump(mode="json"), given["requested"].model_dump(mode="json")
    device = context.device or device_of(context.denoiser)
    entries = {
        "source": source or _source_of(context.pipeline),
        "recipe": recipe.called(),
        "custom_recipe": custom if is_custom(kind) else None,
        "preset": given["preset"],
        "effort": given["effort"],
        "hyperparameters": plain(recipe),
        "spec": spec,
        "requested_spec": None if requested == spec else requested,
        "components": given["components"],
        "budget": given["budget"],
        "activation_budget": given.get("activation_budget"),
        "correction": given["correction"],
        "calibration": context.calibration.model_dump(mode="json"),
        "data": None if images is None else {"folder": images.folder.name, "key": images.key()},
        "conditions": list(context.request.conditions),
        "prompts_given": given["prompts"] is not None,
        "guidance": context.request.guidance,
        "inputs": {name: fingerprint(value) for name, value in context.request.all_inputs().items()},
        "dtype": str(next(context.denoiser.parameters()).dtype).removeprefix("torch."),
        "device": None if device.type == "cpu" else str(device),
        "seed": context.seed,
        "versions": versions(),
    }
    return {name: value for name, value in entries.items() if value is not None}


def _source_of(pipeline: Any) -> str:
    given = str(getattr(pipeline.config, "_name_or_path", "") or type(pipeline).__name__)
    return Path(given).name if Path(given).is_dir() else given


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
    """The shell command that makes a quantized model again; raises `StepquantError` if no options express it."""
    reason = _python_only(provenance)
    if reason:
        raise StepquantError(f"no command makes this model again: {reason}.")
    lines = [" ".join(map(shlex.quote, ["stepquant", *_words(provenance), "--out", "OUT"]))]
    if provenance["prompts_given"]:
        prompts = " ".join(shlex.quote(str(prompt)) for prompt in provenance["conditions"])
        lines.insert(0, f"printf '%s\\n' {prompts} > prompts.txt")
    return "\n".join(lines)


def _python_only(provenance: dict[str, Any]) -> str:
    """Return what the options cannot express; "" if there is nothing."""
    if "hyperparameters" not in provenance:
        return "its provenance was written by an older version of stepquant, or by another way of quantizing"
    if provenance.get("custom_recipe", {"file": ""})["file"] is None:
        return f"the recipe {provenance['recipe']} is not at the top level of a file"
    if provenance["inputs"]:
        return f"it was calibrated with inputs of the pipeline's call ({', '.join(provenance['inputs'])})"
    for spec in (_requested_spec(provenance), *provenance.get("also", {}).values()):
        defaults = QuantSpec.parse(spec["bits"]).model_dump(mode="json")
        for name, value in spec.items():
            if name not in SPEC_OPTIONS and value != defaults[name]:
                return f"its spec sets {name}"
    return ""


def _requested_spec(provenance: dict[str, Any]) -> dict[str, Any]:
    """The spec before a budget added overrides."""
    spec: dict[str, Any] = provenance.get("requested_spec", provenance["spec"])
    return spec


def _words(provenance: dict[str, Any]) -> Iterator[str]:
    """The arguments of ``stepquant``; those that have their default values are left out."""
    recipe, custom, spec = provenance["recipe"], provenance.get("custom_recipe"), _requested_spec(provenance)
    values = {name: value for name, value in provenance["hyperparameters"].items() if value != _usual(provenance, name)}
    if recipe == QAT.name:
        yield from ("train", provenance["source"])
        if "data" in provenance:
            yield from ("--data", provenance["data"]["folder"])
        yield from ("--distill",) if values.pop("distill", False) else ()
    else:
        yield from ("quantize", provenance["source"])
        yield from ("--recipe", recipe if custom is None else f"{custom['file']}:{custom['name']}")
    options = {
        "bits": None if "components" in provenance else spec["bits"],
        "preset": provenance.get("preset"),
        "effort": provenance["effort"],
        **{name: provenance["calibration"][name] for name in ("samples", "steps", "trajectories", "size")},
        **{name: provenance.get(name) for name in ("budget", "guidance", "device", "dtype")},
        "activation-budget": provenance.get("activation_budget"),
        "prompts": "prompts.txt" if provenance["prompts_given"] else None,
        "seed": provenance["seed"],
    }
    for name, value in options.items():
        if value not in (None, DEFAULTS.get(name)):
            yield from (f"--{name}", str(value))
    for option, pairs in (
        ("--set", {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}),
        ("--component", {name: other["bits"] for name, other in provenance.get("components", {}).items()}),
        ("--override", spec["overrides"]),
        ("--step-bits", spec.get("step_bits", {})),
        ("--also", {name: other["bits"] for name, other in provenance.get("also", {}).items()}),
    ):
        for name, value in pairs.items():
            yield from (option, f"{name}={value}")
    yield from ("--exact-time",) if spec["exact_time"] else ()
    yield from ("--correct",) if provenance["correction"] else ()
    yield from ("--on-low-quality", "raise-bits") if "raised" in provenance else ()
    if spec["smoothing"] is not None:
        yield "--smoothing" if spec["smoothing"] else "--no-smoothing"
    if spec["activations"] != "static":
        yield from ("--activations", spec["activations"])
    if spec["group_size"] is not None:
        yield from ("--group-size", str(spec["group_size"]))


def _usual(provenance: dict[str, Any], name: str) -> Any:
    """A hyperparameter as preset and effort give it; None for a custom recipe, whose class is unknown."""
    recipes: dict[str, type[Recipe]] = {QAT.name: QAT, **RECIPES}
    recipe = recipes.get(provenance["recipe"])
    if recipe is None or "custom_recipe" in provenance:
        return object()
    return plain(getattr(find_recipe(recipe, provenance.get("preset"), None, provenance["effort"]), name, None))
