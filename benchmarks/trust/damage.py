"""Damage a checkpoint at random, update its hashes, and load it.

    python benchmarks/trust/damage.py --trials 1000 --json benchmarks/results/trust-damage.json

Every damage must be rejected with one line (`StepquantError`), or be harmless: only numbers changed, within their
valid range, and the model runs. Anything else ends the command with a traceback.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import stepquant
from benchmarks.trust.interruption import build
from stepquant.checkpoint.format import MANIFEST, WEIGHTS, Manifest, record
from stepquant.errors import StepquantError
from stepquant.loading import resolve_pipeline
from stepquant.memory import peak_resident_bytes
from stepquant.quiet import silence_libraries


def reseal(folder: Path) -> None:
    """As an attacker could, update all records and the digest to match the files."""
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_text())
    files = {path.relative_to(folder).as_posix(): record(path) for path in folder.rglob("*") if path.is_file()}
    files.pop(MANIFEST)
    (folder / MANIFEST).write_text(manifest.model_copy(update={"files": files}).sealed().to_json())


def mutate(chance: random.Random, folder: Path) -> str:
    """Damage the weights or a configuration at random, update the hashes, and return the kind of damage."""
    weights = folder / "unet" / WEIGHTS
    kind = chance.choice(["flip", "cut", "swap", "config"])
    if kind == "flip":
        content = bytearray(weights.read_bytes())
        for _ in range(chance.choice([1, 1, 4, 64])):
            content[chance.randrange(min(len(content), chance.choice([8, 3000, len(content)])))] ^= (
                1 << chance.randrange(8)
            )
        weights.write_bytes(content)
    elif kind == "cut":
        weights.write_bytes(weights.read_bytes()[: chance.randrange(weights.stat().st_size)])
    elif kind == "swap":
        tensors = load_file(weights)
        one, other = chance.sample(sorted(tensors), 2)
        tensors[one], tensors[other] = tensors[other], tensors[one]
        save_file(tensors, weights)
    else:
        path = chance.choice(sorted(folder.rglob("*config.json")))
        content = bytearray(path.read_bytes())
        at = chance.randrange(len(content))
        content[at : at + chance.choice([0, 1, 3])] = chance.choice([b"", b"9", b"-", b"]", b"99999", b"null", b"\xff"])
        path.write_bytes(content)
    reseal(folder)
    return kind


def harmless(folder: Path) -> bool:
    """Whether the folder loads as a model that runs: the damage only changed numbers within their valid range."""
    pipeline = stepquant.load(folder)
    config = pipeline.unet.config
    size = config.sample_size if isinstance(config.sample_size, int) else 16
    x = torch.zeros(1, config.in_channels, size, size)
    return pipeline.unet(x, 3).sample.shape[0] == 1


def trial(chance: random.Random, saved: Path, folder: Path) -> tuple[str, str]:
    """Damage a copy and load it; return the kind, and ``"refused"`` or ``"harmless"``."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved, folder)
    kind = mutate(chance, folder)
    try:
        assert harmless(folder)
    except StepquantError as error:
        assert "\n" not in str(error)
        return kind, "refused"
    return kind, "harmless"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    silence_libraries()
    torch.set_num_threads(1)
    chance = random.Random(arguments.seed)
    outcomes: Counter[tuple[str, str]] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        build(root / "model")
        small = stepquant.Calibration(samples=4, steps=2)
        quantized = stepquant.quantize(
            resolve_pipeline(str(root / "model")), "w4a8", recipe="minmax", calibration=small
        )
        quantized.save_pretrained(root / "saved")
        before = peak_resident_bytes()
        for number in range(arguments.trials):
            outcomes[trial(chance, root / "saved", root / "damaged")] += 1
            if number % 100 == 99:
                print(f"{number + 1} of {arguments.trials}", file=sys.stderr)
    result = {
        "trials": arguments.trials,
        "outcomes": {f"{kind}, {outcome}": count for (kind, outcome), count in sorted(outcomes.items())},
        "peak_memory_grew_by_bytes": peak_resident_bytes() - before,
        "seed": arguments.seed,
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if arguments.json:
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()
