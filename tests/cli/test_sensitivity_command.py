"""``stepquant sensitivity``, and budgets on the command line."""

import json
import math
import re
import shlex
from itertools import pairwise

import pytest
from PIL import Image
from typer.testing import CliRunner

import stepquant
from stepquant.cli.main import app
from stepquant.layers.quantized import quantized_modules

FRAGILE = "up_blocks.1.resnets.1.conv2"


def _run(*arguments):
    return CliRunner().invoke(app, ["sensitivity", *(str(argument) for argument in arguments)])


def test_figures_and_the_command_that_uses_them(fragile_folder, tmp_path):
    out = tmp_path / "new" / "out"
    arguments = (fragile_folder, "--bits", "w4a8", "--samples", 8, "--steps", 4, "--out", out)
    result = _run(*arguments, "--budget", "5bits")
    assert result.exit_code == 0, result.output
    rows = [line.split("│")[1].strip() for line in result.stdout.splitlines() if line.startswith("│")]
    assert rows[0] == FRAGILE
    figures = json.loads((out / "sensitivity.json").read_text())
    errors = {layer["name"]: layer["error"] for layer in figures["layers"]}
    assert max(errors, key=errors.__getitem__) == FRAGILE
    assert figures["step_groups"] == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert all(len(layer["errors"]) == 4 for layer in figures["layers"])
    command = result.stdout[result.stdout.index("stepquant quantize ") :].replace("\\\n", " ")
    words = shlex.split(command)
    overrides = [word for before, word in pairwise(words) if before == "--override"]
    assert dict(word.rsplit("=", 1) for word in overrides) == figures["overrides"]
    assert figures["overrides"][f"^{re.escape(FRAGILE)}$"] == "w8a8"
    with Image.open(out / "sensitivity.png") as image:
        assert image.format == "PNG" and min(image.size) > 500

    again = _run(*arguments)
    assert again.exit_code == 0
    assert "--override" not in again.stdout
    same = json.loads((out / "sensitivity.json").read_text())
    assert same["layers"] == figures["layers"] and "overrides" not in same


@pytest.mark.usefixtures("small_ranking")
def test_quantizing_within_a_budget_spares_the_fragile_layer(fragile_folder, tmp_path):
    out = tmp_path / "out"
    small = ["--recipe", "minmax", "--bits", "w4a8", "--samples", 4, "--steps", 2, "--out", out]
    arguments = ["quantize", fragile_folder, "--budget", "4.8bits", "--correct", *small]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "within 4.8 bits a weight" in result.stderr
    layers = quantized_modules(stepquant.load(out).unet)
    bits = {name: module.format.weight.bits for name, module in layers.items()}
    assert bits[FRAGILE] == 8 and 4 in bits.values()
    weights = {name: math.prod(module.weight_shape) for name, module in layers.items()}
    assert sum(bits[name] * weights[name] for name in bits) <= 4.8 * sum(weights.values())
    shown = CliRunner().invoke(app, ["inspect", str(out)]).stdout
    assert (
        "budget: 4.8" in shown
        and "output correction: 2 steps, output scaled by" in shown
        and "cached per timestep" in shown
    )

    again = CliRunner().invoke(app, [str(argument) for argument in [*arguments, "--overwrite", "--budget", "3"]])
    assert again.exit_code == 2 and "budget of 3 bits cannot be met" in again.stderr
    assert stepquant.load(out).unet is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "3bits"], "a budget of 3 bits cannot be met"),
        (["--budget", "9"], "a budget of 9 bits cannot be met"),
        (["--budget", "lots"], "not understood"),
        (["--bits", "w8a8", "--budget", "8"], "8 bits already"),
        (["--bits", "w16a16"], "nothing to quantize"),
        (["--method", "magic"], "expected one of one-at-a-time, leave-one-out"),
        (["--samples", "0"], "'--samples'"),
        (["--steps", "0"], "'--steps'"),
        (["--prompts", "/no/such/file"], "cannot be read"),
    ],
)
def test_bad_input_is_reported_in_one_line_and_nothing_is_written(arguments, message, fragile_folder, tmp_path):
    result = _run(fragile_folder, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file(fragile_folder, tmp_path):
    (tmp_path / "out").write_text("years of work")
    result = _run(fragile_folder, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "cannot write" in result.stderr
    assert (tmp_path / "out").read_text() == "years of work"
