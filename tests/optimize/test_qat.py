import pytest
import torch
from PIL import Image
from test_network import Stop, StopIn

import stepquant
from stepquant.calibration.collection import collect_all
from stepquant.calibration.fake_quant.activation import ActivationPoint
from stepquant.calibration.fake_quant.activation_quantizers import GeneratedScale
from stepquant.errors import StepquantError
from stepquant.layers.quantized import quantized_modules
from stepquant.pipelines.request import make_request
from stepquant.progress import Progress

SMALL = stepquant.Calibration(samples=4, steps=2, trajectories=4)


def train(pipeline, bits="w4a4", **arguments):
    """Arguments include hyperparameters."""
    recipe = {"iterations": 6, "batch_size": 4} | {
        name: arguments.pop(name) for name in list(arguments) if name in stepquant.recipes.QAT.fields()
    }
    given = {"distill": recipe.pop("distill", True), "calibration": SMALL, "hyperparameters": recipe}
    return stepquant.train(pipeline, bits, **given | arguments)


def test_a_killed_training_ends_in_the_same_bytes(unconditional_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr("stepquant.optimize.trainer.SAVE_EVERY", 2)

    def run(folder, progress=None):
        quantized = train(
            unconditional_pipeline, ema_decay=0.9, refresh=2, workspace=tmp_path / folder, progress=progress
        )
        return quantized.unet.state_dict()

    whole = run("whole")
    with pytest.raises(Stop):
        run("killed", StopIn("Training", -1))  # killed before the first iteration
    with pytest.raises(Stop):
        run("killed", StopIn("Training", 3))
    continued = run("killed")
    assert whole.keys() == continued.keys()
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Images of bright squares."""
    folder = tmp_path_factory.mktemp("squares")
    for index in range(6):
        image = Image.new("L", (20, 16))
        image.paste(255, (3 + index, 3, 9 + index, 12))
        image.save(folder / f"{index}.png")
    return folder


def test_distillation_reduces_the_error_on_unseen_trajectories(unconditional_pipeline):
    pipeline = unconditional_pipeline
    fresh = SMALL.model_copy(update={"steps": 4})
    samples = collect_all(pipeline, pipeline.unet, make_request(pipeline, 4), fresh, 50, Progress())

    def error(iterations):
        quantized = train(pipeline, "w2a8", iterations=iterations, weight_rate=1e-2, refresh=5)
        with torch.no_grad():
            output = quantized.unet(**samples.arguments(slice(None))).sample
        return float((output - samples.outputs(slice(None))).square().mean())

    assert error(40) < 0.85 * error(0)


def test_training_on_images_reduces_the_error_of_their_noise(unconditional_pipeline, squares):
    timestep = torch.arange(20, 1000, 70)
    clean = torch.full((len(timestep), 1, 16, 16), -1.0)
    clean[:, :, 3:12, 4:10] = 1
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(1))
    noisy = unconditional_pipeline.scheduler.add_noise(clean, noise, timestep)

    def error(pipeline):
        with torch.no_grad():
            return float((pipeline.unet(noisy, timestep).sample - noise).square().mean())

    trained = train(unconditional_pipeline, data=squares, distill=False, iterations=30, weight_rate=1e-2)
    assert error(trained) < 0.8 * error(unconditional_pipeline)


def test_the_stored_table_is_that_of_the_generator_over_all_timesteps(class_pipeline, monkeypatch):
    generated = []
    freeze = ActivationPoint.freeze

    def recorded(point):
        if isinstance(point.quantizer, GeneratedScale):
            generator = point.quantizer.gain.eval()
            generated.append((point.scale * generator(torch.arange(point.layout.rows))).detach())
        freeze(point)

    monkeypatch.setattr(ActivationPoint, "freeze", recorded)
    quantized = train(class_pipeline, guidance=4.0)
    layers = {name: module.layer() for name, module in quantized_modules(quantized.transformer).items()}
    tables = [layer.input.scale for layer in layers.values() if layer.input is not None]
    assert {len(table) for table in tables} == {1000}
    for table in tables:
        assert any(torch.equal(table[..., 0], scale) for scale in generated)
    assert {layer.weight.bits for layer in layers.values()} == {4, 8}
    assert layers["pos_embed.proj"].weight.bits == layers["proj_out_2"].weight.bits == 8
    assert any(bool((table[0] != table[-1]).any()) for table in tables)
    static = quantized_modules(train(class_pipeline, intervals="static", iterations=1).transformer).values()
    assert {layer.layer().input.rows for layer in static if layer.layer().input} == {1}


def test_trained_norms_are_stored_and_the_original_is_unchanged(unconditional_pipeline, tmp_path):
    before = {name: tensor.clone() for name, tensor in unconditional_pipeline.unet.state_dict().items()}
    quantized = train(unconditional_pipeline)
    assert all(torch.equal(before[name], tensor) for name, tensor in unconditional_pipeline.unet.state_dict().items())
    name = "conv_norm_out.weight"
    trained, original = quantized.unet.state_dict()[name], unconditional_pipeline.unet.state_dict()[name]
    assert not torch.equal(trained, original)
    stepquant.save(quantized, tmp_path / "out")
    loaded = stepquant.load(tmp_path / "out").unet.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in quantized.unet.state_dict().items())


def test_a_training_that_diverges_is_stopped(unconditional_pipeline):
    with pytest.raises(StepquantError, match="diverged"):
        train(unconditional_pipeline, weight_rate=1e20, intervals="static", iterations=20)


def test_training_needs_images_or_distillation(unconditional_pipeline, tmp_path):
    with pytest.raises(StepquantError, match="nothing to learn from"):
        train(unconditional_pipeline, distill=False)
    with pytest.raises(StepquantError, match="holds no images"):
        train(unconditional_pipeline, data=tmp_path)
    with pytest.raises(StepquantError, match="no hyperparameter 'magic'"):
        train(unconditional_pipeline, hyperparameters={"magic": 1})
