"""``stepquant reproduce``: the printed command makes the same files."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from typer.testing import CliRunner

import stepquant
from stepquant.checkpoint import read_manifest
from stepquant.cli.main import app
from stepquant.recipes import MinMax, QuEST

COMMANDS = {
    "quantize": ["--recipe", "quest", "--bits", "w4a4", "--set", "iterations=2", "--set", "rounding=adaround",
                 "--set", "rounding_iterations=2", "--set", "time_iterations=2", "--set", "scale_rate=1e-4",
                 "--override", "mid_block=w8a8", "--exact-time", "--no-smoothing", "--correct", "--seed", 3],
    "paper": ["--recipe", "pqd", "--preset", "paper", "--bits", "w4a8", "--effort", "quick", "--budget", "5bits",
              "--trajectories", 3, "--set", "iterations=2"],
    "train": ["--distill", "--bits", "w4a8", "--set", "iterations=2", "--set", "batch_size=2"],
}  # fmt: skip


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.usefixtures("small_ranking")
@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_makes_the_same_files(name, unconditional_folder, tmp_path):
    verb = "train" if name == "train" else "quantize"
    small = ("--samples", 4, "--steps", 2)
    _run(verb, unconditional_folder, *COMMANDS[name], *small, "--out", tmp_path / "first")
    words = shlex.split(_run("reproduce", tmp_path / "first"))
    assert words[:3] == ["stepquant", verb, str(unconditional_folder)]
    _run(*words[1 : words.index("--out")], "--out", tmp_path / "second")
    first, second = (read_manifest(tmp_path / out) for out in ("first", "second"))
    assert first.files == second.files
    assert first.provenance == second.provenance


def test_prompts_and_guidance_are_reproduced(text_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("it's a b\n\nc\n")
    small = ("--recipe", "minmax", "--samples", 2, "--steps", 2, "--guidance", 2.5, "--prompts", "mine.txt")
    _run("quantize", text_folder, *small, "--out", "first")
    prompts, command = _run("reproduce", "first").splitlines()
    subprocess.run(prompts, shell=True, check=True)
    words = shlex.split(command)
    _run(*words[1 : words.index("--out")], "--out", "second")
    assert read_manifest(tmp_path / "first").files == read_manifest(tmp_path / "second").files
    assert read_manifest(tmp_path / "second").provenance["conditions"] == ["it's a b", "c"]


@pytest.mark.parametrize(
    ("spec", "recipe", "message"),
    [
        ("w8a8", type("Typed", (MinMax,), {"__module__": "console"}), "not at the top level of a file"),
        ({"bits": "w8a8", "softmax_bits": 16}, MinMax, "its spec sets softmax_bits"),
    ],
)
def test_a_model_that_no_command_makes(spec, recipe, message, unconditional_pipeline, tmp_path):
    calibration = stepquant.Calibration(samples=2, steps=2)
    quantized = stepquant.quantize(unconditional_pipeline, spec, recipe=recipe(), calibration=calibration)
    stepquant.save(quantized, tmp_path / "out")
    result = CliRunner().invoke(app, ["reproduce", str(tmp_path / "out")])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_a_folder_without_a_manifest(unconditional_folder):
    result = CliRunner().invoke(app, ["reproduce", str(unconditional_folder)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1


def test_recipes_shows_presets_and_hyperparameters():
    output = _run("recipes")
    assert "rounding=adaround" in output and "rounding=gptq" in output
    shown = _run("recipes", "quest")
    for name, field in QuEST.fields().items():
        assert name in shown and str(field.default) in shown
    assert "20000" in shown and "Optimizer steps" in shown
    assert "ema_decay" in _run("recipes", "qat")


def test_the_plan_counts_every_stage(unconditional_folder, tmp_path):
    small = ("--recipe", "quest", "--samples", 2, "--steps", 2, "--set", "rounding_iterations=1")
    short = ("--set", "time_iterations=1", "--set", "iterations=1", "--out", tmp_path / "out")
    result = CliRunner().invoke(app, [str(word) for word in ("quantize", unconditional_folder, *small, *short)])
    assert result.exit_code == 0, result.output
    (plan,) = (line for line in result.stderr.splitlines() if line.startswith("plan: "))
    assert plan.count("(about ") >= 4
