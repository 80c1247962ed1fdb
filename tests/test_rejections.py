"""Whatever a user gives that a pipeline cannot use ends in one sentence, or works; never in a raw exception."""

from __future__ import annotations

import json

import pytest
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

import stepquant
from stepquant.cli.main import app
from stepquant.errors import StepquantError
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from tests.families.registry import FAMILIES

TINY = {"samples": 2, "steps": 2}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return FAMILIES["Stable Video Diffusion"].build(tmp_path_factory.mktemp("video"))


@pytest.fixture(scope="module")
def text_video(tmp_path_factory):
    return FAMILIES["Wan 2.1"].build(tmp_path_factory.mktemp("text-video"))


def refused(pipeline, **arguments) -> str:
    with pytest.raises(StepquantError) as raised:
        stepquant.quantize(pipeline, "w8a8", **{"recipe": "minmax", "calibration": TINY} | arguments)
    message = str(raised.value)
    assert "\n" not in message and message.endswith(".")
    return message


def test_a_wrong_key(video):
    message = refused(video, inputs={"picture": 1})
    assert "'picture', which is not an argument of StableVideoDiffusionPipeline; expected" in message
    assert "image, height, width, num_frames" in message


def test_a_missing_image(video):
    assert "needs image, and inputs has none. Pass what its call needs as `inputs`" in refused(video)


@pytest.mark.parametrize(
    "inputs", [{"image": 3}, {"image": "no-such-file.jpg"}, {"image": None}, {"num_frames": 0}, {"num_frames": "all"}]
)
def test_wrong_images_and_frames(inputs, video):
    given = dict(FAMILIES["Stable Video Diffusion"].call) | inputs
    assert "StableVideoDiffusionPipeline rejects its arguments" in refused(video, inputs=given)


def test_images_of_different_sizes(tmp_path):
    family = FAMILIES["Stable Video Diffusion"]
    pipeline = family.build(tmp_path)
    sizes = [{"height": 16, "width": 16}, {"height": 16, "width": 32}]
    inputs = [dict(family.call) | size for size in sizes]
    request = make_request(pipeline, 2, inputs=inputs)
    with pytest.raises(StepquantError, match=r"generates samples of the shapes .* and .*; expected one shape"):
        generate(pipeline, request, range(2), 0)


def test_wrong_sizes(text_video):
    given = dict(FAMILIES["Wan 2.1"].call) | {"height": 17}
    assert "WanPipeline rejects its arguments" in refused(text_video, prompts=["a"], inputs=given)


def test_more_steps_than_the_model_knows(tmp_path):
    pipeline = FAMILIES["Consistency model"].build(tmp_path)
    message = refused(pipeline, calibration={"samples": 2})
    assert "steps is 50; expected at most the 40 timesteps that the model has. Set `steps` to 40 or fewer." in message


def test_a_pipeline_without_a_denoiser(text_pipeline):
    class Encoder(DiffusionPipeline):
        def __init__(self, vae):
            super().__init__()
            self.register_modules(vae=vae)

    assert "Encoder has no denoiser; expected a component" in refused(Encoder(text_pipeline.vae))


def test_conditions_of_different_lengths_and_a_single_sample(tmp_path):
    pipeline = FAMILIES["Z-Image"].build(tmp_path)
    arguments = {"prompts": ["a red bicycle", "a"], "inputs": dict(FAMILIES["Z-Image"].call)}
    stepquant.quantize(pipeline, "w8a8", recipe="minmax", calibration=TINY, **arguments)
    stepquant.quantize(pipeline, "w8a8", recipe="minmax", calibration={"samples": 1, "steps": 2}, **arguments)


@pytest.fixture(scope="module")
def video_folder(video, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "video"
    video.save_pretrained(folder)
    FAMILIES["Stable Video Diffusion"].call["image"].save(folder.parent / "image.png")
    return folder


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (None, 'needs image, and inputs has none. Pass what its call needs as --inputs, such as {"image": ...}.'),
        ({"picture": "image.png"}, "inputs contains 'picture', which is not an argument of StableVideoDiffusion"),
        ({"image": "none.png"}, "none.png cannot be read: [Errno 2] No such file"),
        ({"image": "image.png", "num_frames": 0}, "StableVideoDiffusionPipeline rejects its arguments: max()"),
        ([], "holds list; expected an object of arguments of the pipeline's call"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "quantize"])
def test_wrong_inputs_of_the_command(command, inputs, message, video_folder, tmp_path):
    given = video_folder.parent / "inputs.json"
    if isinstance(inputs, dict):
        inputs = {"height": 16, "width": 16, "decode_chunk_size": 2} | inputs
    given.write_text(json.dumps(inputs))
    arguments = [command, video_folder, *(["--inputs", given] if inputs is not None else [])]
    if command == "quantize":
        arguments += ["--recipe", "minmax", "--samples", 2, "--steps", 2, "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    (line,) = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and line.startswith("stepquant: ") and message in line
