"""The tables of README.md and docs/ as Markdown, from benchmarks/results; `benchmarks.pages` inserts them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean, mean, stdev
from typing import Any

RESULTS = Path(__file__).parent / "results"
Line = dict[str, Any]

RECIPES = ("minmax", "ptq4dm", "q-diffusion", "pqd", "eda-dm", "tfmq", "tdq, static", "tdq", "quest, rounding only")
RECIPES += ("quest", "best")
PAIRS = (
    ("pqd", "minmax"), ("tdq", "minmax"), ("eda-dm", "minmax"), ("quest", "minmax"), ("pqd", "ptq4dm"),
    ("eda-dm", "q-diffusion"), ("tdq", "tdq, static"), ("quest", "quest, rounding only"), ("quest", "q-diffusion"),
    ("best", "quest"),
)  # fmt: skip
MODELS = ("fashion-class", "fashion-ddpm", "emoji-ldm")
RENAMED = {"balanced": "smoothed", "compensated": "GPTQ only", "and learned on": "GPTQ, then learned"}
"""Words in the labels of older lines -> what they are called now."""
ABLATIONS = {
    "eda-dm": ("eda-dm", "eda-dm, uniform", "eda-dm, normal", "eda-dm, block only", "eda-dm, layers only"),
    "tdq": tuple(f"tdq{kind}{samples}" for samples in ("", ", 64 samples", ", 32 samples", ", 16 samples")
                 for kind in ("", ", free table", ", static")),
    "quest": ("quest, rounding only", "quest, + TLA", "quest, critical layers ranked", "quest, without the global loss",
              "quest, shared scales", "quest, not smoothed", "quest, exact time layers", "quest, corrected"),
    "combined": ("minmax, smoothed", "minmax, corrected", "q-diffusion, smoothed"),
    "rounding": ("q-diffusion, GPTQ only", "q-diffusion, GPTQ, then learned", "q-diffusion, AdaRound"),
}  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def read(name: str) -> list[Line]:
    """The lines of a file of results, with present labels."""
    lines = [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]
    for line in lines:
        for old, new in RENAMED.items():
            line["label"] = line.get("label", "").replace(old, new)
    return lines


def error(line: Line) -> float:
    """The error of the denoiser's output: geometric mean over the steps, percent."""
    return geometric_mean(line["step_error_percent"])


def psnr(line: Line) -> float:
    return line["psnr_db"]


def spread(values: Sequence[float], decimals: int = 2, sign: str = "") -> str:
    """Mean and standard deviation, such as ``22.43 ± 0.74``; of one value ``22.43 (1)``."""
    if not values:
        return ""
    first = f"{mean(values):{sign}.{decimals}f}"
    return f"{first} (1)" if len(values) == 1 else f"{first} ± {stdev(values):.{decimals}f}"


def average(lines: list[Line], name: str, decimals: int, factor: float = 1.0, unit: str = "") -> str:
    values = [factor * line[name] for line in lines]
    return f"{mean(values):.{decimals}f}{unit}" if values else ""


def recipes(bits: str) -> str:
    """Every recipe on every reference model: mean and standard deviation over seeds."""
    lines = [line for line in read("papers") if line["bits"] == bits]
    head = (bits.upper(), "class: PSNR, dB", "error, %", "right class", "ddpm: PSNR, dB", "error, %", "Frechet")
    seeds = {(line["model"], line["seed"]): line for line in lines}.values()
    whole = [[line for line in seeds if line["model"] == model] for model in MODELS]
    agreement = average(whole[0], "class_agreement_fp32", 1, 100, " %")
    rows = [["full precision", "", "", agreement, "", "", average(whole[1], "frechet_classifier_fp32", 1), "", ""]]
    for label in RECIPES:
        classes, ddpm, emoji = (
            [line for line in lines if (line["label"], line["model"]) == (label, model)] for model in MODELS
        )
        if classes or ddpm or emoji:
            cells = [
                [spread([value(line) for line in part]) for value in (psnr, error)] for part in (classes, ddpm, emoji)
            ]
            agreement, frechet = (
                average(classes, "class_agreement", 1, 100, " %"),
                average(ddpm, "frechet_classifier", 1),
            )
            rows.append([f"`{label}`", *cells[0], agreement, *cells[1], frechet, *cells[2]])
    return table((*head, "emoji: PSNR, dB", "error, %"), rows)


def pairs(bits: str) -> str:
    """PSNR and relative error of a recipe less those of another, within seeds: mean, deviation, number of seeds."""
    found = {(line["model"], line["label"], line["seed"]): line for line in read("papers") if line["bits"] == bits}
    rows = []
    for recipe, baseline in PAIRS:
        cells = []
        for model in MODELS:
            seeds = [seed for name, label, seed in found if (name, label) == (model, recipe)]
            both = [
                (found[model, recipe, s], found[model, baseline, s]) for s in seeds if (model, baseline, s) in found
            ]
            gain = spread([psnr(a) - psnr(b) for a, b in both], 1, "+").removesuffix(" (1)")
            excess = spread([100 * (error(a) / error(b) - 1) for a, b in both], 0, "+").removesuffix(" (1)")
            cells.append(f"{gain} dB, {excess} % ({len(both)})" if both else "")
        if any(cells):
            rows.append([f"`{recipe}` over `{baseline}`", *cells])
    return table((bits.upper(), *MODELS), rows)


def summary(bits: str) -> str:
    """PSNR of the best-known recipes on every model, as in the README."""
    lines = [line for line in read("papers") if line["bits"] == bits]
    rows = []
    for label in ("minmax", "q-diffusion", "tdq", "quest", "best"):
        parts = [[line for line in lines if (line["label"], line["model"]) == (label, model)] for model in MODELS]
        cells = [spread([psnr(line) for line in part], 1) + " dB" for part in parts]
        name = "[`best`](examples/best.py)" if label == "best" else f"`{label}`"
        rows.append([name, cells[0], average(parts[0], "class_agreement", 1, 100, " %"), *cells[1:]])
    return table(("PSNR", "`fashion-class`", "right class", "`fashion-ddpm`", "`emoji-ldm`"), rows)


def cost() -> str:
    """Mean CPU time and highest memory of each recipe on `fashion-ddpm` at W4A4, of the seeds measured in CPU time."""
    lines = [line for line in read("papers") if (line["model"], line["bits"]) == ("fashion-ddpm", "w4a4")]
    lines = [line for line in lines if line["seed"] > 0]  # seed 0 has wall-clock time of a busy machine
    rows = []
    for label in RECIPES:
        part = [line for line in lines if line["label"] == label]
        memory = f"{max(line['peak_memory_bytes'] for line in part) / 1e9:.2f} GB"
        rows.append([f"`{label}`", average(part, "quantize_seconds", 0, 1, " s"), memory])
    return table(("`fashion-ddpm`, W4A4", "time to quantize", "peak memory"), rows)


def ablation(paper: str) -> str:
    """One study of a paper's components: `fashion-class` at W4A4, seed 0."""
    found = {line["label"]: line for line in read("ablations")}
    rows = []
    for label in ABLATIONS[paper]:
        line = found[label]
        last = f"{line['step_error_percent'][-1]:.1f} %"
        rows.append(
            [f"`{label}`", f"{psnr(line):.2f}", f"{error(line):.2f} %", last, f"{line['quantize_seconds']:.0f} s"]
        )
    return table(("recipe", "PSNR, dB", "error", "error of the last step", "time to quantize"), rows)


def stages() -> str:
    """What combines with any recipe: `fashion-class` at W4A4, seed 100."""
    rows = []
    for line in read("stages"):
        if line["bits"] == "w4a4":
            last = f"{line['step_error_percent'][-1]:.0f} %"
            rows.append([f"`{line['label']}`", f"{psnr(line):.2f} dB", last, f"{line['quantize_seconds']:.0f} s"])
    return table(("recipe", "PSNR", "error of the last step", "time to quantize"), rows)


def dynamic(bits: str) -> str:
    """Static against dynamic activations: PSNR per model, over the seeds that were run."""
    lines = [line for line in read("dynamic") if line["bits"] == bits]
    rows = []
    for label in dict.fromkeys(line["label"] for line in lines):
        found = ([psnr(x) for x in lines if (x["label"], x["model"]) == (label, model)] for model in MODELS)
        rows.append([f"`{label}`", *(spread(values) for values in found)])
    return table(("PSNR, dB", *(f"`{model}`" for model in MODELS)), rows)


def auto() -> str:
    """The recipe auto against the best of the study of the recipes, each in the same cell."""
    rows = []
    for line in read("auto"):
        cell = [line[name] for name in ("model", "bits", "seed")]
        others = [other for other in read("papers") if [other[name] for name in ("model", "bits", "seed")] == cell]
        best = max(others, key=psnr)
        rows.append([f"`{line['model']}`", line["bits"].upper(), f"{psnr(line):.2f}", f"{psnr(best):.2f}"])
        rows[-1] += [f"`{best['label']}`", f"{line['quantize_seconds']:.0f} s", f"{best['quantize_seconds']:.0f} s"]
    head = ("model", "bits", "`auto`, PSNR, dB", "best other", "which", "CPU time", "of the other")
    return table(head, rows)


def training() -> str:
    """Every training run: a row each."""
    rows = []
    order = ("generator", "static", "table")
    by_run = [(line["bits"], line["model"], line["source"] == "data", line["seed"]) for line in read("qat")]
    for run in sorted(set(by_run), key=by_run.index):
        lines = [line for line, key in zip(read("qat"), by_run, strict=True) if key == run]
        for line in sorted(lines, key=lambda line: order.index(line["intervals"])):
            name = f"`{line['model']}` {line['bits'].upper()}" + (", data" if line["source"] == "data" else "")
            figures = [f"{line[key][steps]:.2f}" for key in ("psnr_db", "frechet_classifier") for steps in ("20", "10")]
            rows.append([name, line["intervals"], str(line["seed"]), *figures, f"{line['cpu_seconds']} s"])
    head = ("200 iterations", "intervals", "seed", "PSNR, dB, 20 steps", "10 steps", "Frechet, 20 steps", "10 steps")
    return table((*head, "time to train"), sorted(rows, key=lambda row: (row[0].split()[1], row[0], row[2])))


def agreement(what: str) -> str:
    """PSNR to the simulation, of all images together (``images``) or of the output at the middle step (``outputs``)."""
    typical = {"images": "pooled", "outputs": "median"}[what]
    lines = read("runtime-agreement")
    key = "pictures" if what == "images" and "pictures" in lines[0] else what
    names = list(lines[0][key])
    rows = []
    for line in lines:
        cells = [f"{line[key][name][typical]:.1f} ({line[key][name]['worst']:.1f})" for name in names]
        rows.append([f"{line['model']} {line['bits'].upper()}", *cells])
    return table(("", *names), rows)


def contest(name: str) -> dict[str, Line]:
    """Name of a contestant of ``stepquant bench`` -> its timing."""
    renamed = {"a scale a step": "per-step scales"}
    timings = json.loads((RESULTS / f"{name}.json").read_text())["timings"]
    for timing in timings:
        for old, new in renamed.items():
            timing["name"] = timing["name"].replace(old, new)
    return {timing["name"]: timing for timing in timings}


def speed(which: str) -> str:
    """Latency per step of the DDPM CIFAR-10 UNet: ``main`` contestants, or ``all``."""
    eight, one = contest("bench-cifar-ddpm-batch8"), contest("bench-cifar-ddpm-batch1")
    chosen = ("torch eager float32", "torch.compile bfloat16", "OpenVINO int8 (NNCF)", "optimum-quanto int8")
    chosen += ("stepquant w8a8, native, per-step scales",)
    rows = []
    for name in chosen if which == "main" else eight:
        cells = []
        for timing in (eight[name], one[name]):
            cells += [f"{1000 * timing['seconds']:.1f} ms", f"{timing['speedup']:.2f}x"]
        stepquant = name.startswith("stepquant")
        rows.append([f"**{name}**" if stepquant else name, *(f"**{cell}**" if stepquant else cell for cell in cells)])
    return table(("", "batch 8", "speedup", "batch 1", "speedup"), rows)


def stable_diffusion() -> str:
    """Latency per step of the UNet of Stable Diffusion 1.5, a column for each of the three runs."""
    runs = [contest(f"bench-sd15-batch2{suffix}") for suffix in ("", "-openvino", "-torch")]
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run):
        rows.append([name, *(f"{run[name]['seconds']:.2f} s, {run[name]['speedup']:.2f}x" if name in run else ""
                             for run in runs)])  # fmt: skip
    return table(("", "alone", "beside OpenVINO", "beside torch.compile"), rows)


def transformers() -> str:
    """Latency per step of the transformers of ``stepquant bench`` at W8A8, one run each."""
    rows = []
    for key, name in (("wan", "Wan"), ("qwen-image", "Qwen-Image"), ("flux", "FLUX")):
        timings = contest(f"bench-{key}")
        cells = [f"{timings['torch eager float32']['seconds']:.2f} s"]
        for scales in ("per-step", "static"):
            timing = timings[f"stepquant w8a8, native, {scales} scales"]
            cells.append(f"{timing['seconds']:.2f} s, {timing['speedup']:.2f}x")
        rows.append([name, *cells])
    return table(("", "torch eager float32", "native, per-step scales", "native, static scales"), rows)


def scaling() -> str:
    """Efficiency by number of processes, of the model in `benchmarks/trust/scaling.py`."""
    model = json.loads((RESULTS / "trust-scaling.json").read_text())
    counts = list(next(iter(model.values()))["seconds"])
    rows = [
        [f"efficiency, {name}", *(f"{part['seconds'][count]['efficiency']:.2f}" for count in counts)]
        for name, part in model.items()
    ]
    return table(("processes", *counts), rows)
