"""Prompt sets for evaluating text-to-image models."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from stepquant.errors import StepquantError
from stepquant.pipelines.request import read_prompts

PARTI = "parti"
"""Name of the bundled set: PartiPrompts, 1,632 prompts (Apache-2.0, Google Research; arXiv 2206.10789)."""


def prompt_set(name: str) -> list[str]:
    """Read a prompt set in its order.

    Args:
        name: ``parti``; a COCO ``captions_*.json``, of which the first caption of each image is used, as is usual for
            FID on COCO; or a text file with one prompt per line.

    Raises:
        StepquantError: if there is no such set or file, or it contains no prompt.
    """
    if name == PARTI:
        with Path(__file__).with_name("parti_prompts.tsv").open(newline="", encoding="utf-8") as file:
            return [row["Prompt"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    if name.endswith(".json"):
        return _coco_captions(Path(name))
    return read_prompts(Path(name))


def _coco_captions(path: Path) -> list[str]:
    try:
        annotations = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        first: dict[int, str] = {}
        for annotation in annotations:
            first.setdefault(annotation["image_id"], " ".join(annotation["caption"].split()))
    except (OSError, UnicodeDecodeError) as error:
        raise StepquantError(f"prompts file {path} cannot be read: {error}.") from None
    except (ValueError, KeyError, TypeError):
        raise StepquantError(f"{path} is not a file of COCO captions; expected captions_val2014.json.") from None
    if not first:
        raise StepquantError(f"prompts file {path} contains no caption.")
    return [first[image] for image in sorted(first)]
