"""Prompt sets that text-to-image models are judged on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from stepquant.errors import StepquantError
from stepquant.pipelines.generate import read_prompts

PARTI = "parti"
"""Name of the set that is shipped: PartiPrompts, 1,632 prompts (Apache-2.0, Google Research; arXiv 2206.10789)."""


def prompt_set(name: str) -> list[str]:
    """Prompts of a set, in its order: ``parti``; a COCO ``captions_*.json``; or a text file with a prompt a line.

    A COCO image has several captions: the first of each is taken, as is usual for FID on COCO.

    Raises:
        StepquantError: if there is no such set or file, or it holds no prompt.
    """
    if name == PARTI:
        with Path(__file__).with_name("parti_prompts.tsv").open(newline="", encoding="utf-8") as file:
            return [row["Prompt"] for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]
    if name.endswith(".json"):
        return _coco_captions(Path(name))
    return read_prompts(Path(name))


def _coco_captions(path: Path) -> list[str]:
    try:
        annotations = json.loads(path.read_text())["annotations"]
        first: dict[int, str] = {}
        for annotation in annotations:
            first.setdefault(annotation["image_id"], " ".join(annotation["caption"].split()))
    except (OSError, UnicodeDecodeError) as error:
        raise StepquantError(f"prompts file {path} cannot be read: {error}.") from None
    except (ValueError, KeyError, TypeError):
        raise StepquantError(f"{path} holds no COCO captions: expected a file such as captions_val2014.json.") from None
    if not first:
        raise StepquantError(f"prompts file {path} holds no caption.")
    return [first[image] for image in sorted(first)]
