"""Everything that determines a quantized model is written down, and the command made of it makes the same model."""

import shlex

import pytest
import torch
from typer.testing import CliRunner

import stepquant
from stepquant.cli.main import app
from stepquant.errors import StepquantError
from stepquant.loading import resolve_pipeline
from stepquant.models import denoiser_name
from stepquant.provenance import command
from stepquant.recipes import PQD, MinMax, QDiffusion, QuEST
from stepquant.saving import provenance_of

SMALL = {"samples": 4, "steps": 2}


def of(pipeline):
    return provenance_of(getattr(pipeline, denoiser_name(pipeline)))


def tensors(pipeline):
    return getattr(pipeline, denoiser_name(pipeline)).state_dict()


def made_again(provenance, folder, monkeypatch):
    """Run the command, prompts file included."""
    monkeypatch.chdir(folder)
    *prompts, line = command(provenance).splitlines()
    if prompts:
        words = shlex.split(prompts[0])
        assert words[:2] == ["printf", "%s\\n"] and words[-2] == ">"
        (folder / words[-1]).write_text("\n".join(words[2:-2]) + "\n")
    program, *arguments = shlex.split(line)
    assert program == "stepquant"
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return stepquant.load(folder / "OUT", backend="reference")


@pytest.mark.parametrize(
    "arguments",
    [
        {"recipe": "ptq4dm", "hyperparameters": {"mean": 0.3}, "seed": 3},
        {"recipe": QuEST(rounding_iterations=0, time_iterations=0, iterations=1, critical="attention")},
        {"recipe": "minmax", "budget": "6bits", "correction": True},
        {"recipe": "q-diffusion", "effort": "quick", "hyperparameters": {"iterations": 0}},
    ],
)
def test_the_command_makes_the_same_tensors(arguments, unconditional_folder, tmp_path, monkeypatch):
    spec = {"bits": "w4a8", "overrides": {r"mid_block\.resnets": "w8a8"}, "exact_time": True}
    pipeline = resolve_pipeline(str(unconditional_folder))
    given = arguments | {"calibration": SMALL, "source": str(unconditional_folder), "backend": "reference"}
    first = stepquant.quantize(pipeline, spec, **given)
    second = made_again(of(first), tmp_path, monkeypatch)
    assert of(first)["hyperparameters"] == of(second)["hyperparameters"]
    mine, theirs = tensors(first), tensors(second)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_prompts_and_guidance_are_in_it(text_folder, tmp_path, monkeypatch):
    pipeline = resolve_pipeline(str(text_folder))
    prompts = ["it's a cat", "two $dogs"]
    first = stepquant.quantize(
        pipeline, "w4a8", recipe=MinMax(), calibration=SMALL, prompts=prompts, guidance=3.0,
        source=str(text_folder), backend="reference",
    )  # fmt: skip
    assert of(first)["conditions"] == prompts and of(first)["guidance"] == 3.0
    second = made_again(of(first), tmp_path, monkeypatch)
    assert of(second)["conditions"] == prompts
    mine, theirs = tensors(first), tensors(second)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_everything_that_determines_the_result_is_recorded(text_pipeline):
    quantized = stepquant.quantize(
        text_pipeline, "w4a8", recipe="pqd", preset="paper", effort="quick", calibration=SMALL,
        hyperparameters={"iterations": 0}, also={"vae": "w8a16"}, seed=7,
    )  # fmt: skip
    found = of(quantized)
    assert found["recipe"] == "pqd" and found["preset"] == "paper" and found["effort"] == "quick"
    assert found["hyperparameters"] == {**dict(PQD.preset("paper")), "iterations": 0}
    assert found["conditions"], "the model's own examples"
    assert found["spec"]["bits"] == "w4a8" and found["also"]["vae"]["bits"] == "w8a16"
    assert (found["dtype"], found["seed"], found["inputs"]) == ("float32", 7, {})
    assert set(found["versions"]) == {"stepquant", "torch", "diffusers", "python"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"spec": {"bits": "w4a8", "group_size": 8}}, "its spec sets group_size"),
        ({"inputs": {"eta": 0.5}}, r"inputs of the pipeline's call \(eta\)"),
    ],
)
def test_what_no_option_expresses(arguments, reason, unconditional_pipeline):
    given = {"spec": "w4a8", "recipe": "minmax", "calibration": SMALL} | arguments
    provenance = of(stepquant.quantize(unconditional_pipeline, given.pop("spec"), **given))
    with pytest.raises(StepquantError, match=reason):
        command(provenance)


class Mine(QDiffusion):
    """A recipe at the top level of a file."""


def test_a_custom_recipe_is_named_by_its_file(unconditional_pipeline):
    class Hidden(QDiffusion):
        """One that no file has at its top level."""

    found, hidden = (
        of(stepquant.quantize(unconditional_pipeline, "w4a8", recipe=recipe(iterations=0), calibration=SMALL))
        for recipe in (Mine, Hidden)
    )
    assert found["recipe"] == "Mine" and len(found["custom_recipe"]["sha256"]) == 64
    assert "--recipe test_provenance.py:Mine" in command(found)
    with pytest.raises(StepquantError, match="the recipe Hidden is not at the top level of a file"):
        command(hidden)
