from pathlib import Path

import pytest
import torch

import stepquant
from stepquant.calibration.fake_quant.weight import WeightPoint
from stepquant.calibration.fake_quant.weight_quantizers import RoundToNearest
from stepquant.core.affine import affine_from_range, fake_quantize
from stepquant.errors import StepquantError
from stepquant.layers.quantized import quantized_modules
from stepquant.recipes import Recipe
from stepquant.recipes.stages import AddQuantizers, CalibrateRanges, CollectSamples
from stepquant.user_code import load_function

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_quantizer.py"
ClosedForm = load_function(f"{EXAMPLE}:ClosedForm", "recipe")
LeastSquares = load_function(f"{EXAMPLE}:LeastSquares", "quantizer")
laplace_range = load_function(f"{EXAMPLE}:laplace_range", "quantizer")
SMALL = stepquant.Calibration(samples=8, steps=2)


def test_a_custom_quantizer_is_saved_and_loaded(unconditional_pipeline, tmp_path):
    """Its scales differ from the baseline's, with less squared error in every weight below 8 bits."""
    quantized = stepquant.quantize(unconditional_pipeline, "w4a8", recipe=ClosedForm, calibration=SMALL)
    baseline = stepquant.quantize(unconditional_pipeline, "w4a8", recipe="minmax", calibration=SMALL)
    found, before = quantized_modules(quantized.unet), quantized_modules(baseline.unet)
    errors = {}
    for name, module in found.items():
        weight = unconditional_pipeline.unet.get_submodule(name).weight.detach()
        mine, theirs = (m.layer().weight.dequantize() - weight for m in (module, before[name]))
        errors[name] = float(mine.square().sum() / theirs.square().sum())
    narrow = {name for name, module in found.items() if module.format.weight.bits == 4}
    assert len(narrow) == len(found) - 2 and all(errors[name] < 1 for name in narrow)
    inputs = {name for name, module in found.items() if module.format.input is not None}
    assert any(not torch.equal(found[name].input_scale, before[name].input_scale) for name in inputs)
    stepquant.save(quantized, tmp_path / "model")
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(stepquant.load(tmp_path / "model").unet(x, 500).sample, quantized.unet(x, 500).sample)


@pytest.mark.parametrize("groups", [(12,), (5, 7)])
def test_smoothed_and_grouped_weights_improve_as_well(groups):
    torch.manual_seed(0)
    weight, smoothing = torch.randn(6, 12, 3, 3), torch.rand(12) + 0.5
    errors = []
    for rounding in (RoundToNearest, LeastSquares):
        point = WeightPoint(weight, 3, groups, "minmax", rounding)
        point.smooth(weight, smoothing)
        errors.append((point(weight) - weight).mul(smoothing[:, None, None]).square().flatten(1).sum(1))
    assert bool((errors[1] < errors[0]).all())


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_laplace_range_is_optimal_for_laplace_values(bits):
    values = torch.distributions.Laplace(0.5, 2.0).icdf((torch.arange(200_000) + 0.5)[None] / 200_000)
    ends = laplace_range(values, bits, values.amin(1), values.amax(1))

    def error(factor: float) -> float:
        grid = affine_from_range(*(0.5 + factor * (end - 0.5) for end in ends), bits)
        return float((fake_quantize(values, *(part[:, None] for part in grid), bits) - values).square().mean())

    # The paper assumes uniform errors within a cell, so its optimum is accurate to a few per cent.
    assert error(1.0) < 1.05 * min(error(0.9), error(1.1)) and error(1.0) < min(error(0.7), error(1.4))


class Shifted(RoundToNearest):
    """Breaks an invariant: its zero point lies between two codes."""

    @staticmethod
    def search(values, bits, method):
        scale, zero_point = RoundToNearest.search(values, bits, method)
        return scale, zero_point + 0.5


class Negative(RoundToNearest):
    @staticmethod
    def search(values, bits, method):
        scale, zero_point = RoundToNearest.search(values, bits, method)
        return -scale, zero_point


def endless_range(values, bits, low, high):
    return low, high * torch.inf


@pytest.mark.parametrize(
    ("rounding", "activation_range", "reason"),
    [
        (Shifted, "minmax", "a zero point is not an integer from 0 to 255"),
        (Negative, "minmax", "a scale of the weight is not a positive number"),
        (RoundToNearest, endless_range, "a scale of the activation is not a positive number"),
        (RoundToNearest, None, "an activation was not calibrated"),
    ],
)
def test_invalid_grids(rounding, activation_range, reason, unconditional_pipeline):
    class Broken(Recipe):
        def stages(self):
            stages = [CollectSamples(), AddQuantizers(weight_range="minmax", rounding=rounding)]
            return stages if activation_range is None else [*stages, CalibrateRanges(method=activation_range)]

    with pytest.raises(StepquantError, match=f"layer .* cannot be stored: {reason}"):
        stepquant.quantize(unconditional_pipeline, "w4a8", recipe=Broken(), calibration=SMALL)
