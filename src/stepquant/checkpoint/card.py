"""The model card of a quantized pipeline: ``README.md`` at its root, which the hub shows. It may be edited."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

CARD = "README.md"


def model_card(pipeline: Any, stored: Mapping[str, int], provenance: dict[str, Any]) -> str:
    """Write the model card: metadata for the hub, a description, and how to load the model.

    Args:
        stored: name of each quantized denoiser -> size of its weights on disk.
    """
    source, recipe = str(provenance.get("source", "")), str(provenance.get("recipe", "round to nearest"))
    bits = str(provenance.get("spec", {}).get("bits", ""))
    tags = ["stepquant", "quantized", *([bits] if bits else [])]
    head = ["---", "library_name: diffusers", "tags:", *(f"- {tag}" for tag in tags)]
    if source.count("/") == 1:
        head += [f"base_model: {source}", "base_model_relation: quantized"]
    title = f"{source or type(pipeline).__name__} {bits}".strip()
    rows = {
        "pipeline": type(pipeline).__name__,
        "denoiser": ", ".join(
            f"{type(getattr(pipeline, name)).__name__}, {size / 1e6:.2f} MB" for name, size in stored.items()
        ),
        "bits": bits,
        "recipe": recipe,
        "check": str(provenance.get("check", {}).get("summary", "")),
    } | {
        key: json.dumps(provenance[key], sort_keys=True)
        for key in ("hyperparameters", "calibration", "seed", "versions")
        if key in provenance
    }
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items() if value)]
    code = [
        "```python",
        "import stepquant  # teaches diffusers to load this folder",
        "from diffusers import DiffusionPipeline",
        "",
        'pipe = DiffusionPipeline.from_pretrained("...")  # this repository or folder',
        "```",
    ]
    others = provenance.get("also", {})
    rest = "Everything else in the folder is as it was."
    if others:
        named = ", ".join(f"{name} ({entry['bits']})" for name, entry in others.items())
        rest = f"Weights of other models were rounded to nearest: {named}. The rest of the folder is as it was."
    quantized = "denoiser" if len(stored) == 1 else " and the ".join(stored)
    about = (
        f"The {quantized} of {source or 'a diffusers pipeline'}, quantized to {bits or 'integers'} by "
        f"stepquant's recipe `{recipe}`. {rest}"
    )
    return "\n".join([*head, "---", "", f"# {title}", "", about, "", *code, "", *table, ""])
