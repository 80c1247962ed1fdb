"""``python tests/models/families_table.py``: run `test_table.py` and write its results to ``docs/families.md``."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLUMNS = ("quantize", "save", "load", "sample", "int8_runtime", "lora", "offload")
HEAD = """# What works with which model?

Each cell is a test on a small model of the family, built from its configuration.
`python tests/models/families_table.py` runs them and writes this page.

- *int8 runtime*: every layer but the first runs in int8.
- *load*: diffusers' `from_pretrained` and `stepquant.load` give the same images, bit for bit.
- A dash: diffusers does not support it for this model.

"""
TAIL = """
## Other models

Any other denoiser of diffusers is described by the data flow of one call that its pipeline makes; `stepquant inspect`
prints the description and what stays in floating point. A block whose outputs mix samples cannot be reconstructed, and
gives an error. Text encoders and autoencoders keep full precision unless `--also text_encoder=w8a16` quantizes their
weights. Layers that a model's class keeps in float32 stay so: T5's `wo`, Wan's `time_embedder`.

## Pipelines

img2img, inpainting, ControlNet beside the denoiser, and LCM are tested with Stable Diffusion 1. For LoRA on a quantized
Flux, call `pipe.transformer.load_lora_adapter`.

## Attention

Attention operands are quantized in the plain and the joint attention of diffusers. Other kinds of attention keep their
operands in floating point. So do all attentions once an IP-Adapter is loaded, also after it is unloaded, until the
folder is loaded again; activation ranges are those without it.

## torch.compile

`torch.compile` on a quantized denoiser gives the same images. Weight-only quantized models compile completely and gain
speed; int8 models run faster without it ([figures](results/speed.md#torchcompile)).
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        test = Path(__file__).with_name("test_table.py")
        subprocess.run([sys.executable, "-m", "pytest", str(test), f"--junitxml={report}"], cwd=ROOT, check=False)
        cells: dict[str, dict[str, str]] = {}
        for case in xml.parse(report).iter("testcase"):
            match = re.fullmatch(r"test_(\w+)\[(.+)\]", case.get("name", ""))
            assert match is not None
            outcome = {"failure": "no", "error": "no", "skipped": "-"}
            cells.setdefault(match[2], {})[match[1]] = next(
                (outcome[child.tag] for child in case if child.tag in outcome), "yes"
            )
    lines = [
        "| | " + " | ".join(column.replace("_", " ") for column in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    lines += [f"| {family} | " + " | ".join(row[column] for column in COLUMNS) + " |" for family, row in cells.items()]
    (ROOT / "docs" / "families.md").write_text(HEAD + "\n".join(lines) + "\n" + TAIL)


if __name__ == "__main__":
    main()
