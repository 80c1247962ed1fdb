"""``python tests/models/families_table.py``: runs `test_table.py` and writes ``docs/families.md`` from its results."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLUMNS = ("quantize", "save", "load", "sample", "int8_runtime", "lora", "offload")
HEAD = """# What works with which model

Each cell is a test on a small model of the family, built from its configuration;
`python tests/models/families_table.py` runs them and writes this page. "int8 runtime" means every layer but the first;
"load" is diffusers' own `from_pretrained` and `stepquant.load`, bit for bit; a dash means that diffusers has no such
thing for the model.

"""
TAIL = """
Any other denoiser of diffusers that repeats its blocks is described by its structure (tests: Wan, and AnimateDiff's
motion UNet, weights only). Models whose blocks fold frames into the batch cannot be reconstructed block by block, and
say so. Text encoders and autoencoders keep full precision, unless `--also text_encoder=w8a16` asks for their weights to
be rounded. Layers that a model's class keeps in float32 stay so: T5's `wo`, Wan's `time_embedder`.

img2img, inpainting, ControlNet beside the denoiser and LCM are tested on Stable Diffusion 1. Attention operands are
quantized in the plain and the joint flows; an attention of another kind keeps its operands in floating point. So do all
attentions once an IP-Adapter is loaded, also after it is unloaded, until the folder is loaded again; and ranges are
those of images without it. LoRA on a quantized Flux goes through `pipe.transformer.load_lora_adapter`.

`torch.compile` on a quantized denoiser draws the same images. Rounded weights compile whole and gain by it; int8
kernels are called between the pieces of the graph, and run faster without: of the UNet of `zoo:fashion-ddpm` (2.7 M
parameters, batch 4, one thread of a machine that had other work) a step takes 20 ms in int8 and 46 ms compiled, with
rounded weights 98 and 72 ms, in float32 79 and 44 ms (`python benchmarks/compiled.py`,
`benchmarks/results/compiled.json`).
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
