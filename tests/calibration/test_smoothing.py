"""Smoothing: chosen where channels differ, and the network keeps its function."""

import copy

import torch
from torch import nn

import stepquant
from stepquant.calibration.fake_quant.layers import wrap
from stepquant.calibration.model import insert_fake_quantizers
from stepquant.calibration.samples import CalibrationSet
from stepquant.calibration.smoothing import best_smoothing, find_smoothing
from stepquant.config import QuantSpec
from stepquant.layers.clock import StepClock
from stepquant.layers.quantized import quantized_modules
from stepquant.progress import Progress
from tests.described import described


def error_of(layer, x):
    layer.input_point.observe()
    layer(x)
    layer.input_point.calibrate("least-error")
    return float((layer(x) - layer.inner(x)).detach().norm() / layer.inner(x).norm())


def test_smoothing_reduces_the_error_of_unequal_channels():
    torch.manual_seed(0)
    for inner, x in (
        (nn.Linear(16, 32), torch.randn(200, 16) * torch.logspace(-1.5, 1, 16)),
        (nn.Conv2d(16, 32, 3), torch.randn(8, 16, 8, 8) * torch.logspace(-1.5, 1, 16).reshape(-1, 1, 1)),
    ):
        layer = wrap(inner, 4, 4, StepClock(), split=6)
        before = error_of(layer, x)
        columns = x.transpose(0, 1).flatten(1)
        smoothing = best_smoothing(layer, columns)
        assert smoothing is not None and smoothing.shape == (16,)
        assert smoothing[-1] > 5 * smoothing[0] > 0
        layer.smooth(smoothing)
        assert error_of(layer, x) < 0.8 * before


def test_equal_channels_are_not_smoothed():
    torch.manual_seed(0)
    layer = wrap(nn.Linear(8, 64), 4, 4, StepClock())
    with torch.no_grad():
        layer.inner.weight.copy_(torch.randn(64, 1).expand(64, 8))
    x = torch.randn(1, 500).expand(8, 500)
    assert best_smoothing(layer, x.contiguous()) is None


def test_the_search_observes_full_precision_and_changes_nothing(unconditional_pipeline):
    unet = copy.deepcopy(unconditional_pipeline.unet)
    with torch.no_grad():
        for resnet in (module for module in unet.modules() if hasattr(module, "norm2")):
            resnet.norm2.weight.copy_(torch.logspace(-2, 1, len(resnet.norm2.weight)))
    calibrated = insert_fake_quantizers(unet, described(unet), QuantSpec.parse("w4a4"))
    samples = CalibrationSet.of({"sample": torch.randn(6, 1, 16, 16), "timestep": torch.arange(6.0)}, torch.arange(6))
    factors = find_smoothing(calibrated, samples, 4, Progress())
    assert {name for name in calibrated.layers if name.endswith("conv2")} <= set(factors)
    assert "conv_in" not in factors, "its input stays in floating point"
    assert not any(layer.weight_point.bypassed for layer in calibrated.layers.values())
    assert not any(point.calibrated for point in calibrated.activation_points())


def quantized(pipeline, bits, recipe, **settings):
    calibration = stepquant.Calibration(samples=4, steps=2)
    return stepquant.quantize(pipeline, bits, recipe=recipe, calibration=calibration, hyperparameters=settings)


def smoothed(pipeline):
    return [name for name, module in quantized_modules(pipeline.unet).items() if module.format.transforms]


def test_every_recipe_smooths_if_the_spec_requests_it(unconditional_pipeline):
    for asked in (True, False, None):
        spec = {"bits": "w4a4", "smoothing": asked}
        assert bool(smoothed(quantized(unconditional_pipeline, spec, "minmax"))) == bool(asked)
    assert smoothed(quantized(unconditional_pipeline, {"bits": "w4a4", "smoothing": True}, "q-diffusion", iterations=0))


def test_quest_smooths_below_8_bits_and_the_checkpoint_stores_it(unconditional_pipeline, tmp_path):
    short = {"rounding_iterations": 0, "time_iterations": 0, "iterations": 1, "critical": "attention"}
    assert not smoothed(quantized(unconditional_pipeline, "w4a8", "quest", **short))
    made = quantized(unconditional_pipeline, "w4a4", "quest", **short)
    assert smoothed(made)
    made.save_pretrained(tmp_path / "out")
    loaded = stepquant.load(tmp_path / "out", backend="reference")
    x = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded.unet(x, 5).sample, made.unet(x, 5).sample, atol=1e-4, rtol=1e-4)
