"""Wrong input: one line on standard error that names what was expected, exit code 2, no file lost."""

from __future__ import annotations

import re
import shutil

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import stepquant
from stepquant.cli import checkpoint, output
from stepquant.cli.main import app


def _fails(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("stepquant: ")
    return lines[0]


def test_an_unknown_command_is_answered_with_the_commands():
    line = _fails("nonsense")
    assert line.startswith("stepquant: there is no command 'nonsense'; expected one of quantize, train, ")
    assert all(f" {name}" in line for name in ("sample", "evaluate", "bench", "export", "inspect", "zoo"))
    assert _fails("--nonsense") == "stepquant: No such option: --nonsense. See: stepquant --help"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zoo:nope"], "no model 'nope'"),
        (["no-such-folder"], "no model 'no-such-folder'"),
        (["zoo:fashion-ddpm", "--recipe", "magic"], "unknown recipe 'magic'"),
        (["zoo:fashion-ddpm", "--recipe", "none.py:mine"], "there is no recipe file 'none.py'"),
        (["zoo:fashion-ddpm", "--bits", "w5a99"], "99 for the activation"),
        (["zoo:fashion-ddpm", "--bits", "four"], "not understood"),
        (["zoo:fashion-ddpm", "--samples", "0"], "'--samples'"),
        (["zoo:fashion-ddpm", "--steps", "-1"], "'--steps'"),
        (["zoo:fashion-ddpm", "--override", "mid_block"], "REGEX=BITS"),
        (["zoo:fashion-ddpm", "--override", "(=w8a8"], "regular expression"),
        (["zoo:fashion-ddpm", "--recipe", "minmax", "--set", "iterations=5"], "no hyperparameter 'iterations'"),
        (["zoo:fashion-ddpm", "--set", "iterations=5.5"], "iterations of recipe q-diffusion is 5.5"),
        (["zoo:fashion-ddpm", "--set", "iterations"], "expected NAME=VALUE"),
        (["zoo:fashion-ddpm", "--preset", "slow"], "preset of recipe q-diffusion is 'slow'"),
        (["zoo:fashion-ddpm", "--effort", "great"], "'--effort'"),
        (["zoo:fashion-ddpm", "--guidance", "nan"], "--guidance is nan"),
        (["zoo:fashion-ddpm", "--guidance", "4"], "DDIMPipeline has no guidance. Leave out --guidance."),
        (["zoo:fashion-ddpm", "--inputs", "/no/such/file"], "inputs file /no/such/file cannot be read as JSON"),
        (["zoo:fashion-ddpm", "--component", "controlnet=w8a8"], "spec names 'controlnet', which is not a denoiser of"),
        (["zoo:fashion-ddpm", "--component", "unet"], "'unet' cannot be parsed; expected NAME=BITS"),
        (["zoo:fashion-ddpm", "--config", "zoo"], "not a .safetensors file. Leave out --config."),
        (["zoo:fashion-ddpm", "--prompts", "/no/such/file"], "cannot be read"),
        (["zoo:fashion-ddpm", "--steps", "5000"], "the 1000 timesteps that the model has"),
        (["zoo:fashion-ddpm", "--dtype", "bfloat16"], "cannot be bfloat16; expected dtype float32 or float16"),
        (["zoo:fashion-ddpm", "--bits", "w16a16"], "there is nothing to quantize"),
        (["zoo:fashion-ddpm", "--bits", "w4a8", "--budget", "1bits"], "a budget of 1 bits cannot be met"),
        (["zoo:fashion-ddpm", "--also", "vae=w8a16"], "no model 'vae' beside its denoiser"),
        (["zoo:fashion-ddpm", "--override", "no_such=w8a8"], "override 'no_such' matches none of the layers"),
        (["zoo:emoji-ldm", "--size", "33"], "rejects its arguments: `height` and `width` have to be divisible by 8"),
    ],
)
def test_quantize(arguments, message, tmp_path):
    assert message in _fails("quantize", *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to learn from"),
        (["--data", "/no/such/folder"], "is not a folder"),
        (["--distill", "--set", "intervals=magic"], "expected one of generator, static, table"),
        (["--distill", "--set", "iterations=-1"], "iterations of recipe qat is -1"),
        (["--distill", "--set", "batch_size=0"], "batch_size of recipe qat is 0"),
        (["--distill", "--set", "weight_rate=-1"], "expected a finite number, 0 or more"),
        (["--distill", "--set", "weight_rate=NaN"], "expected a finite number, 0 or more"),
        (["--distill", "--set", "ema_decay=1"], "less than 1"),
    ],
)
def test_train(arguments, message, tmp_path):
    assert message in _fails("train", "zoo:fashion-ddpm", *arguments, "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["quantize"], ["train", "--distill"]])
@pytest.mark.parametrize("out", [".", "/", ".."])
def test_a_result_needs_a_name(command, out):
    assert f"--out is '{out}'; expected the name of a new folder" in _fails(*command, "zoo:fashion-ddpm", "--out", out)


def test_a_recipe_with_a_stage_that_is_none(tmp_path):
    (tmp_path / "own.py").write_text(
        "from stepquant.recipes import Recipe\nclass Mine(Recipe):\n    def stages(self): return [3]"
    )
    arguments = ["--recipe", tmp_path / "own.py:Mine", "--samples", 1, "--steps", 1, "--out", tmp_path / "out"]
    runner = CliRunner().invoke(app, ["quantize", "zoo:fashion-ddpm", *map(str, arguments)])
    assert runner.exit_code == 2
    assert "stepquant: recipe Mine has the stage 3: expected objects of the class Stage." in runner.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["quantize", "zoo:fashion-ddpm", "--recipe"],
            "recipe 'bad.py:g' is not a subclass of stepquant.recipes.Recipe",
        ),
        (["sample", "zoo:fashion-ddpm", "--backend"], "runtime g of .* does not accept a layer alone.*argument: 'b'"),
    ],
)
def test_a_function_that_takes_something_else(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text("def g(a, b, c): ...")
    assert re.search(message, _fails(*arguments, "bad.py:g", "--out", "out.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.py"]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("unconditional", ["--prompt", "a"], "unconditional"),
        ("unconditional", ["--label", 1], "unconditional"),
        ("class", ["--label", 10], "label 10 does not exist"),
        ("class", ["--prompt", "a"], "class labels"),
        ("text", ["--label", 1], "conditioned on text"),
        ("unconditional", ["--backend", "nope"], "unknown backend 'nope': expected one of auto, native"),
        ("class", ["--guidance", "nan"], "guidance is nan; expected a finite number"),
        ("text", ["--guidance", "inf"], "guidance is inf; expected a finite number"),
        ("unconditional", ["--count", 0], "'--count'"),
        ("unconditional", ["--steps", 0], "'--steps'"),
        ("unconditional", ["--out", "grid.xyz"], "ends in .png"),
    ],
)
def test_sample(kind, arguments, message, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in _fails("sample", request.getfixturevalue(f"{kind}_folder"), *arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_pipeline(tmp_path):
    for command in (["sample"], ["inspect"], ["quantize", "--out", tmp_path / "out"]):
        assert "no model_index.json" in _fails(*command, tmp_path)


@pytest.fixture(scope="module")
def quantized_folder(unconditional_pipeline, tmp_path_factory):
    calibration = stepquant.Calibration(samples=4, steps=2)
    folder = tmp_path_factory.mktemp("quantized") / "model"
    stepquant.save(stepquant.quantize(unconditional_pipeline, "w8a8", recipe="minmax", calibration=calibration), folder)
    return folder


def test_a_model_that_is_quantized_already(quantized_folder, tmp_path):
    assert "quantized already" in _fails("quantize", quantized_folder, "--out", tmp_path / "out")


def test_weights_that_are_not_finite(unconditional_folder, tmp_path):
    folder = shutil.copytree(unconditional_folder, tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"][0] = float("inf")
    save_file(tensors, weights)
    assert "conv_out.bias" in _fails("quantize", folder, "--out", tmp_path / "out")


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("command", [["quantize"], ["train", "--distill"]])
def test_other_files_in_the_output_folder_are_kept(command, overwrite, unconditional_folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert "--overwrite" in _fails(*command, unconditional_folder, "--out", tmp_path, *overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_output_that_cannot_be_written_is_reported_first(unconditional_folder, tmp_path):
    (tmp_path / "file").write_text("")
    inside = tmp_path / "file" / "out"
    assert "cannot write" in _fails("quantize", unconditional_folder, "--out", inside)
    assert "cannot write" in _fails("sample", unconditional_folder, "--out", inside / "grid.png")
    assert "it is a folder" in _fails("evaluate", tmp_path, "--against", "zoo:fashion-ddpm", "--json", tmp_path)


def test_a_full_disk_is_reported_first(unconditional_folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage)
    assert "not enough disk space" in _fails("quantize", unconditional_folder, "--out", tmp_path / "out")


def test_an_interruption_explains_how_to_continue(tmp_path, monkeypatch):
    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "check_writable_folder", interrupted)
    result = CliRunner().invoke(app, ["quantize", "zoo:fashion-ddpm", "--out", str(tmp_path / "out")])
    assert result.exit_code == 130
    assert "Run the same command again" in result.stderr
