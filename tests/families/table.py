"""``python -m tests.families.table``: check all families, one process each, and write ``docs/families.md``.

Results are kept in ``benchmarks/results/families.json``; a family that is there already is not checked again, unless it
is named (``python -m tests.families.table "Wan 2.1" Mochi``), or failed a check and ``--failed`` is given.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "families.json"
PAGE = ROOT / "docs" / "families.md"
LIMIT = 400
"""Seconds that one family may take."""
ERROR_LIMIT = 0.03
"""Largest relative error of the denoiser's output at W8A8."""

HEAD = """# What works with which model?

Each row is a tiny pipeline of diffusers, built from its configuration with random weights, and called as a user would
(`tests/families/`). `python -m tests.families.table` runs the checks and writes this page.

- *minmax*, *q-diffusion*: quantized to W8A8 by `minmax`, to W4A8 by `q-diffusion` (block reconstruction).
- *load*: diffusers' `from_pretrained` and `stepquant.load` give the same output, bit for bit.
- *integers*: layers of the denoiser that run in integers.
- *error*: largest relative error of the denoiser's output at W8A8 (random weights, min-max ranges).
- *identity*: the denoiser prepared for calibration, with all quantizers disabled, equals the original to 1e-6.
- *lora*, *offload*: LoRA adapters, and sequential offloading.
- A dash: diffusers itself does not support it for this model; the reasons are below the table.

"""


TAIL = """
## Other models

Any other denoiser of diffusers is described by the data flow of one call that its pipeline makes; `stepquant inspect`
prints the description and what stays in floating point. A block whose outputs mix samples cannot be reconstructed, and
gives an error. Text encoders and autoencoders keep full precision unless `--also text_encoder=w8a16` quantizes their
weights. Layers that a model's class keeps in float32 stay so: T5's `wo`, Wan's `time_embedder`.

## Pipelines

For LoRA on a quantized Flux, call `pipe.transformer.load_lora_adapter`.

## Attention

Attention operands are quantized wherever a model calls torch's `scaled_dot_product_attention`, which diffusers does
with its attention backend `native`; [on a CPU](native-kernels.md) they are then multiplied in integers. Linear
attention, and attention that a model computes itself, keep their operands in floating point; so does every attention
while another backend is set, which a warning says. Once an IP-Adapter is loaded, attentions whose processors it
replaces stay in floating point, also after it is unloaded, until the folder is loaded again; activation ranges are
those without it. `fuse_qkv_projections` works on full-precision models only.

## torch.compile

`torch.compile` on a quantized denoiser gives the same images. Weight-only quantized models compile completely and gain
speed; int8 models run faster without it ([figures](results/speed.md#torchcompile)).
"""


def check(name: str) -> dict[str, Any]:
    """Return the row of one family: its cells, seconds, and where exceptions that are no `StepquantError` came from."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    import torch

    from stepquant.errors import StepquantError
    from tests.families.checks import COLUMNS, Case, NotSupported
    from tests.families.registry import FAMILIES

    torch.set_num_threads(1)
    family, started = FAMILIES[name], time.monotonic()
    missing = [package for package in family.requires if importlib.util.find_spec(package) is None]
    if missing:
        return {"missing": missing}
    row: dict[str, Any] = {"cells": {}, "crashes": {}, "unsupported": {}}
    with tempfile.TemporaryDirectory() as folder:
        case = Case(family, Path(folder))
        row["pipeline"] = type(case.pipeline).__name__
        row["denoisers"] = {part: type(getattr(case.pipeline, part)).__name__ for part in family.denoisers}
        for column, run in COLUMNS.items():
            try:
                row["cells"][column] = run(case)
            except NotSupported as reason:
                row["cells"][column] = "-"
                row["unsupported"][column] = str(reason)
            except Exception as error:
                first = (str(error).strip().splitlines() or [""])[0]
                row["cells"][column] = "no: " + (first if isinstance(error, StepquantError | AssertionError) else
                                                f"{type(error).__name__}: {first}")  # fmt: skip
                if not isinstance(error, StepquantError | AssertionError):
                    row["crashes"][column] = traceback.format_exc().splitlines()[-14:]
        if failures(row).get("error"):
            row["dynamic"] = case.dynamic_error()
    row["seconds"] = round(time.monotonic() - started, 1)
    return row


def failures(row: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a row that are not green, with their reasons."""
    cells = row.get("cells", {})
    found = {column: cell.removeprefix("no: ") for column, cell in cells.items() if str(cell).startswith("no")}
    if isinstance(cells.get("error"), float) and cells["error"] > ERROR_LIMIT:
        found["error"] = f"the relative error is {cells['error']:.1%}, more than {ERROR_LIMIT:.0%}"
        if "dynamic" in row:
            found["error"] += f": rounding adds up over the layers; with dynamic activations it is {row['dynamic']:.1%}"
    return found


def page(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table, and below it the reason of every cell that is not green."""
    from tests.families.checks import COLUMNS

    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    notes, unsupported = [], []
    for name, row in rows.items():
        if "missing" in row:
            continue
        cells = [f"{cell:.1%}" if isinstance(cell, float) else cell.split(":")[0] for cell in row["cells"].values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        reasons: dict[str, list[str]] = {}
        for column, reason in failures(row).items():
            reasons.setdefault(reason, []).append(column)
        notes += [f"- {name} ({', '.join(columns)}): {reason}" for reason, columns in reasons.items()]
        for column, reason in row.get("unsupported", {}).items():
            unsupported.append(f"- {name} ({column}): {reason}")
    checked = [row for row in rows.values() if "cells" in row]
    green = sum(not failures(row) for row in checked)
    from tests.families.registry import FAMILIES

    unchecked = f" {len(FAMILIES) - len(checked)} more are not checked yet." if len(checked) < len(FAMILIES) else ""
    summary = f"{green} of {len(checked)} pipelines pass every check.{unchecked}\n\n"
    failed = "\n## What fails\n\n" + "\n".join(notes) + "\n" if notes else ""
    dashes = "\n## What diffusers does not support\n\n" + "\n".join(unsupported) + "\n" if unsupported else ""
    return HEAD + summary + "\n".join(lines) + "\n" + failed + dashes + TAIL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="check these again")
    parser.add_argument("--failed", action="store_true", help="check again what failed")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(check(options.one)))
        return
    from tests.families.registry import FAMILIES

    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in options.families or FAMILIES:
        if name in rows and not options.families and not (options.failed and failures(rows[name])):
            continue
        command = [sys.executable, "-m", "tests.families.table", "--one", name]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)
            lines = done.stdout.splitlines()
            row = json.loads(lines[-1]) if done.returncode == 0 and lines else None
            reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        except subprocess.TimeoutExpired:
            row, reason = None, f"takes more than {LIMIT} seconds"
        rows[name] = row or {"cells": {"minmax": f"no: {reason}"}}
        print(f"{name}: {failures(rows[name]) or rows[name].get('missing') or 'green'}", flush=True)
        RESULTS.write_text(json.dumps({key: rows[key] for key in FAMILIES if key in rows}, indent=1) + "\n")
        PAGE.write_text(page({key: rows[key] for key in FAMILIES if key in rows}))


if __name__ == "__main__":
    main()
