from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from stepquant import __version__, zoo
from stepquant.cli.main import app
from stepquant.recipes import RECIPES

SMALL = ("--samples", 4, "--steps", 2)


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def _rows(output: str) -> dict[str, list[str]]:
    """Name of a layer -> what a table says from its bits on."""
    rows = ([cell.strip() for cell in line.split("│")] for line in output.splitlines())
    return {cells[1]: cells[4:] for cells in rows if len(cells) > 4}


@pytest.fixture(scope="module")
def quantized(unconditional_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("quantized") / "model"
    given = ("--recipe", "minmax", "--bits", "w4a8", *SMALL, "--override", "mid_block=w8a8")
    output = _run("quantize", unconditional_folder, *given, "--out", out)
    assert str(out) in output
    assert re.search(r" in \d+ s: ", output), "the duration"
    assert [path.name for path in out.parent.iterdir()] == ["model"], "the workspace is still there"
    return out


def test_inspect_shows_spec_and_bits(quantized):
    output = _run("inspect", quantized)
    rows = _rows(output)
    assert rows["mid_block.resnets.0.conv1"][0] == "w8a8"
    assert rows["down_blocks.0.resnets.0.conv1"][0] == "w4a8"
    assert '"bits": "w4a8"' in output
    assert 'recipe: "minmax"' in output


def test_train_writes_what_quantize_writes(unconditional_folder, tmp_path):
    out = tmp_path / "trained"
    run = ("--bits", "w4a8", "--distill", "--set", "iterations=2", "--set", "batch_size=2", *SMALL)
    output = _run("train", unconditional_folder, *run, "--out", out)
    assert str(out) in output
    assert [path.name for path in tmp_path.iterdir()] == ["trained"]
    output = _run("inspect", out)
    assert 'recipe: "qat"' in output
    assert '"distill": true' in output
    rows = _rows(output)
    assert rows["down_blocks.0.resnets.0.conv1"][0] == "w4a8"
    assert rows["down_blocks.0.resnets.0.conv1"][2] == "1000"


@pytest.mark.parametrize(("kind", "family"), [("unconditional", "conv_in"), ("class", "transformer_blocks.1")])
def test_inspect_shows_a_full_precision_model(kind, family, request):
    output = _run("inspect", request.getfixturevalue(f"{kind}_folder"))
    assert family in output
    assert "timestep only" in output
    assert "MB in float32" in output
    lines = dict(line.split(": ", 1) for line in output.splitlines() if ": " in line)
    assert lines["first"] == {"unconditional": "conv_in", "class": "pos_embed.proj"}[kind]
    assert lines["timestep"] == "timestep, in units of 1 timesteps of the scheduler"


def test_inspect_lists_what_stays_in_floating_point(unconditional_folder, tmp_path):
    out = tmp_path / "model"
    given = ("--recipe", "minmax", "--bits", "w8a8", *SMALL, "--override", "mid_block=w16a16")
    _run("quantize", unconditional_folder, *given, "--out", out)
    listed = _run("inspect", out).partition("stay in floating point")[2]
    assert "mid_block.resnets.0.conv1" in listed and "left out by the spec" in listed
    assert "conv_in " not in listed


def test_sample_writes_a_grid(quantized, tmp_path):
    out = tmp_path / "new" / "grid.png"
    _run("sample", quantized, "--count", 3, "--steps", 2, "--out", out)
    with Image.open(out) as image:
        assert image.size == (130, 130)


@pytest.mark.parametrize(("kind", "condition"), [("class", ("--label", 3)), ("text", ("--prompt", "a b"))])
def test_sample_takes_conditions(kind, condition, request, tmp_path):
    out = tmp_path / "grid.png"
    folder = request.getfixturevalue(f"{kind}_folder")
    _run("sample", folder, *condition, "--count", 1, "--steps", 1, "--guidance", 2, "--out", out)
    assert out.is_file()


def test_evaluate_writes_figures_and_images(quantized, unconditional_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("stepquant.evaluation.compare.peak_memory_bytes", lambda *_: 1)
    figures, grid = tmp_path / "figures.json", tmp_path / "grid.png"
    files = ("--json", figures, "--grid", grid)
    output = _run("evaluate", quantized, "--against", unconditional_folder, "--count", 2, "--steps", 2, *files)
    assert str(figures) in output
    assert str(grid) in output
    assert "PSNR" in output
    values = json.loads(figures.read_text())
    expected = {
        "psnr_db",
        "ssim",
        "step_error",
        "frechet_classifier",
        "denoiser_bytes",
        "denoiser_bytes_fp32",
        "peak_memory_bytes",
        "seconds_per_step",
        "count",
        "seed",
    }
    assert expected <= set(values)
    assert grid.is_file()


def test_a_damaged_checkpoint_is_reported_in_one_line(quantized, tmp_path):
    folder = shutil.copytree(quantized, tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    result = CliRunner().invoke(app, ["sample", str(folder), "--out", str(tmp_path / "grid.png")])
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1


def test_lists():
    output = _run("recipes")
    assert all(f"{name}: " in output for name in RECIPES)
    output = _run("zoo")
    assert all(f"zoo:{name} " in output for name in zoo.names())


def test_standard_error_holds_one_line(tmp_path):
    """In a separate process, whatever other libraries print."""
    command = ["stepquant.cli.main", "sample", "zoo:fashion-ddpm", "--prompt", "a", "--out", tmp_path / "a.png"]
    process = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.startswith("stepquant: prompts were given")
    assert process.stderr.count("\n") == 1
    assert process.stdout == ""
    assert _run("--version") == f"stepquant {__version__}\n"


@pytest.mark.parametrize("verb", ["quantize", "train"])
@pytest.mark.parametrize("after", [0, 1], ids=["before the workspace is removed", "while it is removed"])
def test_a_run_killed_after_writing_its_result_is_completed_by_the_same_command(
    verb, after, unconditional_folder, tmp_path, monkeypatch
):
    more = {
        "quantize": ["--recipe", "minmax", *SMALL],
        "train": ["--distill", "--set", "iterations=1", "--set", "batch_size=2", *SMALL],
    }
    command = [verb, unconditional_folder, *more[verb]]
    rmtree, calls = shutil.rmtree, []

    def killed(*args, **options):
        calls.append(args)
        if len(calls) > after:
            raise SystemExit(9)
        rmtree(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr("stepquant.cli.checkpoint.rmtree", killed)
        result = CliRunner().invoke(app, [str(part) for part in (*command, "--out", tmp_path / "out")])
        assert result.exit_code == 9
    assert (tmp_path / ".out.work").is_dir()
    other = CliRunner().invoke(app, [str(part) for part in (*command, "--seed", 1, "--out", tmp_path / "out")])
    assert other.exit_code == 2 and "--overwrite" in other.stderr, "the result of another command is not reused"
    assert str(tmp_path / "out") in _run(*command, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
