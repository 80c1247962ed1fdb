"""The provenance of a quantized model is complete: the command made from it reproduces the model."""

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


def recorded(pipeline):
    return provenance_of(getattr(pipeline, denoiser_name(pipeline)))


def tensors(pipeline):
    return getattr(pipeline, denoiser_name(pipeline)).state_dict()


def reproduce(provenance, folder, monkeypatch):
    """Run the printed command, including that of the prompts file."""
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


@pytest.mark.usefixtures("small_ranking")
@pytest.mark.parametrize(
    "arguments",
    [
        {"recipe": "ptq4dm", "hyperparameters": {"mean": 0.3}, "seed": 3},
        {"recipe": QuEST(rounding_iterations=0, time_iterations=0, iterations=1, critical="attention")},
        {"recipe": "minmax", "budget": "6bits", "correction": True},
        {"recipe": "q-diffusion", "effort": "quick", "hyperparameters": {"iterations": 0}},
    ],
)
def test_the_command_reproduces_the_tensors(arguments, unconditional_folder, tmp_path, monkeypatch):
    spec = {"bits": "w4a8", "overrides": {r"mid_block\.resnets": "w8a8"}, "exact_time": True}
    pipeline = resolve_pipeline(str(unconditional_folder))
    given = arguments | {"calibration": SMALL, "source": str(unconditional_folder), "backend": "reference"}
    first = stepquant.quantize(pipeline, spec, **given)
    second = reproduce(recorded(first), tmp_path, monkeypatch)
    assert recorded(first)["hyperparameters"] == recorded(second)["hyperparameters"]
    expected, actual = tensors(first), tensors(second)
    assert expected.keys() == actual.keys() and all(torch.equal(expected[name], actual[name]) for name in expected)


def test_prompts_and_guidance_are_reproduced(text_folder, tmp_path, monkeypatch):
    pipeline = resolve_pipeline(str(text_folder))
    prompts = ["it's a cat", "two $dogs"]
    first = stepquant.quantize(
        pipeline, "w4a8", recipe=MinMax(), calibration=SMALL, prompts=prompts, guidance=3.0,
        source=str(text_folder), backend="reference",
    )  # fmt: skip
    assert recorded(first)["conditions"] == prompts and recorded(first)["guidance"] == 3.0
    second = reproduce(recorded(first), tmp_path, monkeypatch)
    assert recorded(second)["conditions"] == prompts
    expected, actual = tensors(first), tensors(second)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_everything_that_determines_the_result_is_recorded(text_pipeline):
    quantized = stepquant.quantize(
        text_pipeline, "w4a8", recipe="pqd", preset="paper", effort="quick", calibration=SMALL,
        hyperparameters={"iterations": 0}, also={"vae": "w8a16"}, seed=7,
    )  # fmt: skip
    found = recorded(quantized)
    assert found["recipe"] == "pqd" and found["preset"] == "paper" and found["effort"] == "quick"
    assert found["hyperparameters"] == {**dict(PQD.preset("paper")), "iterations": 0}
    assert found["conditions"], "the example prompts of the model"
    assert found["spec"]["bits"] == "w4a8" and found["also"]["vae"]["bits"] == "w8a16"
    assert (found["dtype"], found["seed"], found["inputs"]) == ("float32", 7, {})
    assert set(found["versions"]) == {"stepquant", "torch", "diffusers", "python"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"spec": {"bits": "w4a8", "softmax_bits": 4}}, "its spec sets softmax_bits"),
        ({"inputs": {"eta": 0.5}}, r"inputs of the pipeline's call \(eta\)"),
    ],
)
def test_arguments_without_an_option(arguments, reason, unconditional_pipeline):
    given = {"spec": "w4a8", "recipe": "minmax", "calibration": SMALL} | arguments
    provenance = recorded(stepquant.quantize(unconditional_pipeline, given.pop("spec"), **given))
    with pytest.raises(StepquantError, match=reason):
        command(provenance)


class TopLevel(QDiffusion):
    """A recipe at the top level of a file."""


def test_a_custom_recipe_is_identified_by_its_file(unconditional_pipeline):
    class Local(QDiffusion):
        """A recipe inside a function."""

    top_level, local = (
        recorded(stepquant.quantize(unconditional_pipeline, "w4a8", recipe=recipe(iterations=0), calibration=SMALL))
        for recipe in (TopLevel, Local)
    )
    assert top_level["recipe"] == "TopLevel" and len(top_level["custom_recipe"]["sha256"]) == 64
    assert "--recipe test_provenance.py:TopLevel" in command(top_level)
    with pytest.raises(StepquantError, match="the recipe Local is not at the top level of a file"):
        command(local)
