"""The part of the error that follows the output: found where it was put, undone, kept in the checkpoint."""

import copy

import pytest
import torch

import stepquant
from stepquant.calibration.correction import estimate_correction
from stepquant.calibration.model import insert_fake_quantizers
from stepquant.calibration.samples import CalibrationSet
from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.layers.correction import Correction, correction_of
from stepquant.progress import Progress
from tests.described import described

CALIBRATION = stepquant.Calibration(samples=16, steps=4)


class Distorted(torch.nn.Module):
    """A denoiser with a gain per step and added noise."""

    def __init__(self, model, factors, noise):
        super().__init__()
        self.model, self.factors, self.noise = model, factors, noise

    def forward(self, sample, timestep, return_dict=True):
        exact = self.model(sample, timestep, return_dict=False)[0]
        factor = torch.tensor([self.factors[float(time)] for time in timestep]).reshape(-1, 1, 1, 1)
        generator = torch.Generator().manual_seed(int(timestep.sum()))
        return (exact * factor + self.noise * torch.randn(exact.shape, generator=generator),)


@pytest.fixture(scope="module")
def samples():
    times = torch.tensor([1.0, 500.0]).repeat(20)
    generator = torch.Generator().manual_seed(0)
    tensors = {"sample": torch.randn(40, 1, 16, 16, generator=generator), "timestep": times}
    return CalibrationSet.of(tensors, (times == 1).long())


def test_gain_and_variance_are_estimated(unconditional_pipeline, samples):
    unet = unconditional_pipeline.unet
    calibrated = insert_fake_quantizers(unet, described(unet), QuantSpec.parse("w8a16"))
    distorted = copy.copy(calibrated)
    object.__setattr__(distorted, "model", Distorted(unet, {1.0: 1.25, 500.0: 0.8}, 0.1))
    correction = estimate_correction(unet, distorted, samples, 7, Progress())
    correction.check()
    assert correction.timesteps.tolist() == [1.0, 500.0]
    torch.testing.assert_close(correction.gain, torch.tensor([0.8, 1.25]), rtol=0.02, atol=0)
    torch.testing.assert_close(correction.variance, torch.tensor([0.08, 0.125]) ** 2, rtol=0.1, atol=0)


def _quantized(pipeline, bits="w4a4", recipe="minmax", **arguments):
    return stepquant.quantize(pipeline, bits, recipe=recipe, calibration=CALIBRATION, correction=True, **arguments)


def test_the_correction_removes_the_gain_and_survives_saving(unconditional_pipeline, tmp_path):
    quantized = _quantized(unconditional_pipeline)
    quantized.save_pretrained(tmp_path / "out")
    loaded = stepquant.load(tmp_path / "out")
    found, kept = (correction_of(pipeline.unet).correction() for pipeline in (quantized, loaded))
    assert len(found.gain) == 4 and not torch.equal(found.gain, torch.ones(4))
    for name in ("timesteps", "gain", "variance"):
        assert torch.equal(getattr(found, name), getattr(kept, name))
    x = torch.randn(2, 1, 16, 16)
    plain = copy.deepcopy(loaded.unet)
    plain.output_correction.gain = torch.ones(4)
    with torch.no_grad():
        for row, time in enumerate(found.timesteps.tolist()):
            expected = plain(x, time).sample * found.gain[row]
            torch.testing.assert_close(loaded.unet(x, time).sample, expected)
            torch.testing.assert_close(loaded.unet(x, time, return_dict=False)[0], expected)
        mixed = torch.tensor([found.timesteps[3] + 1, found.timesteps[0]])
        expected = plain(x, mixed).sample * found.gain[[3, 0]].reshape(2, 1, 1, 1)
        torch.testing.assert_close(loaded.unet(x, mixed).sample, expected)
        torch.testing.assert_close(copy.deepcopy(loaded.unet)(x, mixed).sample, expected)


@pytest.mark.parametrize("kind", ["class_pipeline", "text_pipeline"])
def test_conditional_models(kind, request):
    pipeline = request.getfixturevalue(kind)
    quantized = _quantized(pipeline, recipe="ptq4dm")
    assert correction_of(quantized.transformer if kind == "class_pipeline" else quantized.unet) is not None


def test_predicted_variances_are_not_corrected(class_pipeline):
    config = dict(class_pipeline.transformer.config) | {"out_channels": 8}
    pipeline = copy.copy(class_pipeline)
    torch.manual_seed(0)
    pipeline.register_modules(transformer=type(class_pipeline.transformer).from_config(config).eval())
    quantized = _quantized(pipeline).transformer
    x, arguments = torch.randn(1, 4, 8, 8), (torch.tensor([1]), torch.tensor([3]))
    quantized.output_correction.gain.fill_(1)
    with torch.no_grad():
        before = quantized(x, *arguments).sample
        quantized.output_correction.gain.fill_(3)
        after = quantized(x, *arguments).sample
    torch.testing.assert_close(after[:, :4], 3 * before[:, :4])
    assert torch.equal(after[:, 4:], before[:, 4:])


@pytest.mark.parametrize(
    "name, value", [("gain", -1.0), ("gain", float("nan")), ("variance", -1.0), ("timesteps", float("inf"))]
)
def test_invalid_corrections(name, value):
    tables = {"timesteps": torch.tensor([1.0, 2.0]), "gain": torch.ones(2), "variance": torch.zeros(2)}
    Correction(**tables).check()
    tables[name] = tables[name].clone()
    tables[name][0] = value
    with pytest.raises(StepquantError, match="damaged"):
        Correction(**tables).check()
