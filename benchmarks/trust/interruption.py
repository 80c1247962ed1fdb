"""Kill runs at random moments, restart them, and compare with an uninterrupted run.

    python benchmarks/trust/interruption.py --trials 100 --json benchmarks/results/trust-interruption.json

A trial is one command on a tiny pipeline, killed (SIGKILL) after a random time and restarted until it
finishes. It must produce the bytes of the uninterrupted run, without computing a finished stage twice. Runs are forked
from one process that has imported everything, so that a trial takes seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from stepquant.cli import checkpoint, evaluate
from stepquant.cli.main import app
from stepquant.evaluation import compare
from stepquant.progress import Progress
from stepquant.workspace import Workspace

KILLS_PER_TRIAL = 3
"""Maximum number; the next run is not killed."""
SMALL = ["--samples", "8", "--steps", "3"]
FEW = ["--set", "iterations=3", "--set", "rounding_iterations=3", "--set", "time_iterations=3"]
TRAINING = ["--set", "iterations=120", "--set", "batch_size=2"]
GROWING = ("network-", "train-", "sensitivity-")
"""Optimizer states and rankings, which are stored repeatedly; everything else is stored once."""
RUNS: dict[str, list[str]] = {
    "minmax": ["quantize", "--recipe", "minmax", "--bits", "w8a8", *SMALL],
    "q-diffusion": ["quantize", "--recipe", "q-diffusion", "--bits", "w4a8", "--set", "iterations=3", *SMALL],
    "quest": ["quantize", "--recipe", "quest", "--bits", "w4a4", *FEW, *SMALL],
    "training": ["train", "--distill", "--bits", "w4a4", *TRAINING, "--steps", "3"],
}
"""Name -> arguments of ``stepquant``, without model and folder."""


def build(folder: Path) -> None:
    """A small unconditional pipeline with random weights."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
        attention_head_dim=8,
    )
    DDIMPipeline(unet.eval(), DDIMScheduler()).save_pretrained(folder)


class Log:
    """Events of a run, one per line, in a file that survives it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, kind: str, what: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{kind}\t{what}\n")

    def events(self, kind: str) -> list[str]:
        if not self.path.exists():
            return []
        pairs = [line.split("\t") for line in self.path.read_text().splitlines()]
        return [what for found, what in pairs if found == kind]


class Logged(Progress):
    """Logs the beginning and end of each task."""

    def __init__(self, log: Log) -> None:
        self.log = log

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        self.log.add("stage", description)
        yield lambda n: None
        self.log.add("stage", "Between stages")


def start(arguments: list[str], log: Log) -> int:
    """Fork a process that runs ``stepquant ARGUMENTS``; returns its process id."""
    process = os.fork()
    if process:
        return process
    save = Workspace.save

    def logged(self: Workspace, key: str, tensors: dict[str, torch.Tensor]) -> None:
        save(self, key, tensors)
        log.add("kept", key)

    Workspace.save = logged  # type: ignore[method-assign]
    compare.peak_memory_bytes = lambda *_: 0  # a separate process each: takes seconds, stores nothing
    checkpoint.progress = evaluate.progress = lambda: Logged(log)  # type: ignore[assignment]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    code = 1
    try:
        code = app(arguments, standalone_mode=False) or 0
    finally:
        os._exit(code)


def wait(process: int, seconds: float | None = None) -> int | None:
    """The exit code of a process, or None if it still runs after `seconds`."""
    end = time.monotonic() + (seconds if seconds is not None else 600)
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def figures_of(path: Path) -> dict[str, Any]:
    """Figures of an evaluation that do not depend on time or memory."""
    figures = json.loads(path.read_text())
    return {key: value for key, value in figures.items() if not key.startswith(("seconds", "speed", "peak", "model"))}


def trials(count: int, seed: int, names: list[str]) -> dict[str, Any]:
    """Run `count` trials, cycling through the named runs; return the counts."""
    chance = random.Random(seed)
    kills: Counter[str] = Counter()
    kept = again = 0
    different: list[str] = []
    leftovers: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        build(root / "model")
        commands = {name: [*RUNS[name], str(root / "model")] for name in names if name in RUNS}
        wanted: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        for name, command in commands.items():
            began = time.monotonic()
            assert wait(start([*command, "--out", str(root / name)], Log(root / "log"))) == 0
            seconds[name] = time.monotonic() - began
            wanted[name] = bytes_of(root / name)
        if "evaluate" in names:
            quantized = root / next(iter(commands))
            commands["evaluate"] = ["evaluate", str(quantized), "--against", str(root / "model"), "--count", "4"]
            commands["evaluate"] += ["--steps", "3"]
            began = time.monotonic()
            assert wait(start([*commands["evaluate"], "--json", str(root / "figures")], Log(root / "log"))) == 0
            seconds["evaluate"] = time.monotonic() - began
            wanted["evaluate"] = figures_of(root / "figures")
        for trial in range(count):
            name = list(commands)[trial % len(commands)]
            folder = root / f"trial-{trial}"
            folder.mkdir()
            out, log = folder / "out", Log(folder / "log")
            option = "--json" if name == "evaluate" else "--out"
            for attempt in range(KILLS_PER_TRIAL + 1):
                process = start([*commands[name], option, str(out)], log)
                code = wait(process, chance.uniform(0, 1.1 * seconds[name]) if attempt < KILLS_PER_TRIAL else None)
                if code is not None:
                    break
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                if out.exists() and not out.with_name(f".{out.name}.work").exists() and name != "evaluate":
                    code = 0  # it was finished, and about to exit
                    break
                stages = log.events("stage")
                kills[stages[-1] if stages else "Loading"] += 1
            finished = log.events("kept")
            kept += len(finished)
            more = {key: times - 1 for key, times in Counter(finished).items() if not key.startswith(GROWING)}
            again += sum(more.values())
            got = (figures_of(out) if name == "evaluate" else bytes_of(out)) if code == 0 else None
            if got != wanted[name]:
                different.append(f"trial {trial} ({name}): exit code {code}")
            leftovers += [path.name for path in folder.iterdir() if path.name not in ("out", "log")]
            shutil.rmtree(folder)
            print(
                f"trial {trial + 1} of {count}: {name}; {sum(kills.values())} kills, {again} stages computed twice",
                file=sys.stderr,
            )
    return {
        "trials": count,
        "kills": sum(kills.values()),
        "kills_by_stage": dict(sorted(kills.items())),
        "stages_kept": kept,
        "stages_computed_twice": again,
        "results_that_differ": different,
        "files_left_over": leftovers,
        "seed": seed,
        "torch": torch.__version__.partition("+")[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = trials(arguments.trials, arguments.seed, [*RUNS, "evaluate"])
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if arguments.json:
        arguments.json.write_text(text)
    sys.exit(bool(result["results_that_differ"] or result["stages_computed_twice"]))


if __name__ == "__main__":
    main()
