"""Models in half precision are calibrated on the weights they have, and compute in float32 while they are."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

import stepquant
from stepquant.calibration.float32 import computing_in_float32
from stepquant.calibration.model import insert_fake_quantizers
from stepquant.cli.main import app
from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.layers.quantized import quantized_modules
from stepquant.models import denoiser_name
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from tests.described import described

KINDS = ["unconditional_pipeline", "class_pipeline", "text_pipeline"]
SMALL = stepquant.Calibration(samples=6, steps=2)


@pytest.fixture(params=KINDS)
def pipeline(request):
    return request.getfixturevalue(request.param)


def in_type(pipeline, dtype):
    copied = copy.copy(pipeline)
    models = {
        name: copy.deepcopy(part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)
    }
    copied.register_modules(**{name: model.to(dtype) for name, model in models.items()})
    return copied


def denoiser_of(pipeline):
    return getattr(pipeline, denoiser_name(pipeline))


def images(pipeline):
    return generate(pipeline, make_request(pipeline, 2), range(2), 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_equals_that_of_float32_weights(pipeline, dtype):
    half = denoiser_of(in_type(pipeline, dtype))
    wide = computing_in_float32(half)
    seen: dict[str, tuple] = {}
    handle = denoiser_of(pipeline).register_forward_pre_hook(lambda _, a, k: seen.update(call=(a, k)), with_kwargs=True)
    images(pipeline)
    handle.remove()
    args, kwargs = seen["call"]
    with torch.no_grad():
        produced, expected = wide(*args, **kwargs)[0], copy.deepcopy(half).float()(*args, **kwargs)[0]
    assert produced.dtype == torch.float32 and torch.allclose(produced, expected, atol=1e-5)
    assert computing_in_float32(denoiser_of(pipeline)) is denoiser_of(pipeline), "in float32 nothing is to be done"


def test_weights_are_shared_and_unchanged(pipeline):
    half = denoiser_of(in_type(pipeline, torch.bfloat16))
    calibrated = insert_fake_quantizers(computing_in_float32(half), described(half), QuantSpec.parse("w4a8"))
    first = next(half.parameters())
    for name, layer in calibrated.layers.items():
        original = half.get_submodule(name).weight
        if original is not first:
            assert layer.inner.weight.dtype == torch.bfloat16 and layer.inner.weight.data_ptr() == original.data_ptr()
    kept = {id(layer.inner.weight) for layer in calibrated.layers.values()}
    others = {tensor.dtype for tensor in calibrated.model.parameters() if id(tensor) not in kept}
    assert others == {torch.float32}


@pytest.mark.parametrize("recipe", ["pqd", "quest", "tfmq"])
def test_a_half_precision_pipeline_keeps_its_dtype(recipe, text_pipeline, tmp_path):
    half = in_type(text_pipeline, torch.bfloat16)
    few = {"iterations": 2} | {
        "quest": {"time_iterations": 2, "rounding_iterations": 2, "critical": "attention"},
        "tfmq": {"time_iterations": 2},
    }.get(recipe, {})
    quantized = stepquant.quantize(half, "w4a8", recipe=recipe, calibration=SMALL, hyperparameters=few)
    assert {parameter.dtype for parameter in half.unet.parameters()} == {torch.bfloat16}
    assert quantized.unet.dtype == torch.bfloat16
    error = (images(quantized) - images(half)).abs().mean()
    assert 0 < error < 0.2
    quantized.save_pretrained(tmp_path / "model")
    loaded = stepquant.load(tmp_path / "model")
    assert torch.equal(images(DiffusionPipeline.from_pretrained(tmp_path / "model")), images(loaded))
    again = DiffusionPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    assert torch.allclose(images(again), images(quantized), atol=1e-2)
    layers = quantized_modules(quantized.unet)
    for name, layer in quantized_modules(loaded.unet).items():
        assert torch.equal(layer.weight_packed, layers[name].weight_packed)


def test_training_does_not_change_the_original_weights(text_pipeline):
    half = in_type(text_pipeline, torch.bfloat16)
    before = copy.deepcopy(half.unet.state_dict())
    calibration = stepquant.Calibration(samples=4, steps=2, trajectories=2)
    recipe = stepquant.recipes.QAT(iterations=2, batch_size=2)
    trained = stepquant.train(half, "w4a8", distill=True, recipe=recipe, calibration=calibration)
    assert torch.isfinite(images(trained)).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in half.unet.state_dict().items())


def test_codes_equal_those_of_float32_weights(text_pipeline):
    half = in_type(text_pipeline, torch.float16)
    wide = copy.copy(half)
    wide.register_modules(unet=copy.deepcopy(half.unet).float(), text_encoder=text_pipeline.text_encoder)
    results = [
        quantized_modules(stepquant.quantize(source, "w4a16", recipe="minmax", calibration=SMALL).unet)
        for source in (half, wide)
    ]
    assert all(torch.equal(layer.weight_packed, results[1][name].weight_packed) for name, layer in results[0].items())


def test_the_command(text_folder, tmp_path):
    arguments = ["quantize", str(text_folder), "--recipe", "minmax", "--samples", "4", "--steps", "2"]
    arguments += ["--out", str(tmp_path / "model"), "--dtype"]
    done = CliRunner().invoke(app, [*arguments, "int4"])
    assert done.exit_code == 2 and "'int4' is not one of 'float32', 'bfloat16', 'float16'" in done.stderr
    done = CliRunner().invoke(app, [*arguments, "bfloat16"])
    assert done.exit_code == 0, done.output
    unet = stepquant.load(tmp_path / "model").unet
    norm = unet.conv_norm_out.weight
    assert torch.equal(norm, norm.bfloat16().float())


def test_pipelines_that_diffusers_cannot_run_in_bfloat16(unconditional_pipeline):
    half = in_type(unconditional_pipeline, torch.bfloat16)
    with pytest.raises(StepquantError, match=r"DDIMPipeline .* cannot be bfloat16; expected dtype float32 or float16"):
        stepquant.quantize(half, "w4a8", recipe="minmax", calibration=SMALL)
    half = in_type(unconditional_pipeline, torch.float16)
    quantized = stepquant.quantize(half, "w8a8", recipe="minmax", calibration=SMALL)
    assert (images(quantized) - images(half)).abs().mean() < 0.1
