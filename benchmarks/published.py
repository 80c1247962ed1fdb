"""What the preset paper reaches: quality over CPU seconds, and the papers' claims beside ours.

``python -m benchmarks.published`` reads ``benchmarks/results/published.jsonl`` (``make study-papers``), draws
``out/published.png`` and prints the claims as Markdown. It works on any part of the results.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.tables import Line, error, psnr, table
from stepquant.studies.run import read_lines

ROOT = Path(__file__).parents[1]
RESULTS, FIGURE = ROOT / "benchmarks" / "results" / "published.jsonl", ROOT / "out" / "published.png"
MODELS, BITS = ("fashion-ddpm", "fashion-class", "emoji-ldm"), ("w8a8", "w4a8", "w4a4")
RECIPES = ("q-diffusion", "pqd", "tdq", "eda-dm", "tfmq", "quest")


class Claim(NamedTuple):
    """One claim of a paper: `better` has less error than `worse`.

    Attributes:
        figure: what was published, FID unless another metric is named.
        better, worse: labels of the study.
        bits: where it is claimed.
    """

    paper: str
    text: str
    figure: str
    better: str
    worse: str
    bits: tuple[str, ...]


CLAIMS = (
    Claim("PQD", "better than round to nearest", "a few FID from full precision", "pqd, paper 1", "minmax", BITS),
    Claim("PQD", "better than PTQ4DM", "not published in figures", "pqd, paper 1", "ptq4dm, paper", ("w8a8", "w4a8")),
    Claim(
        "TDQ", "better than static intervals", "W8A5 5.71, static 22.43", "tdq, paper 1", "tdq, paper 1, static", BITS,
    ),
    Claim(
        "TDQ", "the generator beats a free table", "W4A4 4.48, max-dynamic 6.30", "tdq, paper 1",
        "tdq, paper 1, free table", BITS,
    ),
    Claim("EDA-DM", "better than Q-Diffusion", "lower FID at W4A8", "eda-dm, paper 1", "q-diffusion, paper 1", BITS),
    Claim("EDA-DM", "TDAC beats uniform samples", "ablation", "eda-dm, paper 1", "eda-dm, paper 1, uniform", BITS),
    Claim("EDA-DM", "TDAC beats PTQ4DM's samples", "ablation", "eda-dm, paper 1", "eda-dm, paper 1, normal", BITS),
    Claim("EDA-DM", "FBR beats the block's loss", "ablation", "eda-dm, paper 1", "eda-dm, paper 1, block only", BITS),
    Claim(
        "QuEST", "better than Q-Diffusion", "W4A8 3.26 / 5.37, W4A4 5.64 / fails", "quest, paper 1",
        "q-diffusion, paper 1", BITS,
    ),
    Claim(
        "QuEST", "TLA beats rounding alone", "W4A8 4.41 / 6.95", "quest, paper 1, + TLA",
        "quest, paper 1, rounding only", BITS,
    ),
    Claim("QuEST", "CMA adds to TLA", "W4A8 3.26 / 4.41", "quest, paper 1", "quest, paper 1, + TLA", BITS),
    Claim(
        "QuEST", "the global loss is needed", "TLA 6.41 / 8.99", "quest, paper 1",
        "quest, paper 1, without the global loss", BITS,
    ),
    Claim("TFMQ-DM", "better than Q-Diffusion", "lower FID at W4A8", "tfmq, paper 1", "q-diffusion, paper 1", BITS),
)  # fmt: skip


def compared(lines: list[Line], claim: Claim, model: str, bits: str) -> float | None:
    """Error of `better` relative to `worse`, less 1, within seeds: mean in percent; None where one is not measured."""
    found = {(line["label"], line["seed"]): line for line in lines if (line["model"], line["bits"]) == (model, bits)}
    seeds = [seed for label, seed in found if label == claim.better and (claim.worse, seed) in found]
    ratios = [100 * (error(found[claim.better, seed]) / error(found[claim.worse, seed]) - 1) for seed in seeds]
    return mean(ratios) if ratios else None


def claims(lines: list[Line]) -> str:
    """Markdown: one row per claim; a claim holds if the error is lower in at least two of three models."""
    rows = []
    for claim in CLAIMS:
        cells, verdicts = [], []
        for bits in claim.bits:
            excess = {model: compared(lines, claim, model, bits) for model in MODELS}
            measured = {model: value for model, value in excess.items() if value is not None}
            if measured:
                values = ", ".join(f"{model} {value:+.0f} %" for model, value in measured.items())
                cells.append(f"{bits.upper()}: {values}")
                wins = sum(value < 0 for value in measured.values())
                verdicts.append(f"{bits.upper()} {wins} of {len(measured)}")
        rows.append(
            [claim.paper, claim.text, claim.figure, "; ".join(cells) or "not measured yet", ", ".join(verdicts) or ""]
        )
    return table(("paper", "claim", "published", "ours: change of the output's error", "holds"), rows)


def draw(lines: list[Line]) -> None:
    """PSNR over CPU seconds: a panel per model and bits, a colour per recipe, `paper` drawn through."""
    figure = Figure(figsize=(4 * len(BITS), 3 * len(MODELS)), layout="constrained")
    panels: Any = figure.subplots(len(MODELS), len(BITS), squeeze=False)
    for row, model in enumerate(MODELS):
        for column, bits in enumerate(BITS):
            axes = panels[row][column]
            axes.set_title(f"{model}, {bits.upper()}", fontsize=9)
            axes.set_xscale("log")
            for index, recipe in enumerate(RECIPES):
                for preset, style in (("paper", "o-"), ("fast", "x--")):
                    points = points_of(lines, model, bits, f"{recipe}, {preset} ")
                    if points:
                        label = recipe if preset == "paper" else None
                        axes.plot(*zip(*points, strict=True), style, color=f"C{index}", label=label, ms=4, lw=1)
            axes.tick_params(labelsize=7)
    panels[0][0].legend(fontsize=7)
    figure.supxlabel("CPU seconds to quantize; through: preset paper, dashed: fast", fontsize=9)
    figure.supylabel("PSNR to full precision, dB", fontsize=9)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=130)


def points_of(lines: list[Line], model: str, bits: str, prefix: str) -> list[tuple[float, float]]:
    """Mean CPU seconds and PSNR over seeds of each budget of a recipe and preset, by seconds."""
    by_label: dict[str, list[Line]] = {}
    for line in lines:
        budget = line["label"].removeprefix(prefix)
        if (line["model"], line["bits"]) == (model, bits) and line["label"].startswith(prefix) and "," not in budget:
            by_label.setdefault(line["label"], []).append(line)
    return sorted(
        (mean(line["quantize_seconds"] for line in part), mean(map(psnr, part))) for part in by_label.values()
    )


def main() -> None:
    lines = read_lines(RESULTS)
    draw(lines)
    print(claims(lines))


if __name__ == "__main__":
    main()
