"""A denoiser without a diffusers pipeline: a custom module with a plain sampling loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stepquant
from stepquant.calibration.collection import samples_of_calls
from stepquant.errors import StepquantError
from stepquant.layers.quantized import quantized_modules
from stepquant.recipes.recipe import run_recipe
from tests.pipelines.test_layout import MODELS, build

QUICK = {"iterations": 2}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x + self.two(torch.nn.functional.silu(self.one(x + time[:, None])))


class Denoiser(nn.Module):
    """Noise of points [B, N, 4], at a time `t`; it is given positions that all points share, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.write, self.time = nn.Linear(4, 32), nn.Linear(32, 4), nn.Linear(1, 32)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])

    def forward(self, x: Tensor, t: Tensor, positions: Tensor, scale: float = 1.0) -> Tensor:
        hidden = self.read(x * scale) + positions
        time = self.time(t[:, None])
        for block in self.blocks:
            hidden = block(hidden, time)
        return self.write(hidden)


def loop(model: nn.Module, record: list[dict[str, Any]] | None = None, count: int = 5, steps: int = 6) -> Tensor:
    """A plain Euler sampler. There are as many points as samples."""
    x = torch.randn(count, 5, 4, generator=torch.Generator().manual_seed(1))
    for step in range(steps):
        time = 1 - step / steps
        arguments = {"x": x, "t": torch.full((count,), time), "positions": torch.ones(5, 32), "scale": 0.5}
        if record is not None:
            record.append(dict(arguments))
        with torch.no_grad():
            x = x - model(**arguments) / steps
    return x


@pytest.fixture(scope="module")
def recorded():
    model, calls = Denoiser().eval(), []
    return model, loop(model, calls), calls


@pytest.mark.parametrize("recipe", ["minmax", "q-diffusion"])
def test_a_plain_module_is_quantized_on_its_calls(recorded, recipe):
    model, expected, calls = recorded
    before = copy.deepcopy(model.state_dict())
    settings = QUICK if recipe == "q-diffusion" else None
    quantized = stepquant.quantize_model(model, calls, "w8a8", recipe, hyperparameters=settings)
    assert set(quantized_modules(quantized)) >= {
        f"blocks.{index}.{name}" for index in range(3) for name in ("one", "two")
    }
    error = (loop(quantized) - expected).norm() / expected.norm()
    assert 0 < error < 0.03
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_samples_of_calls_replay_the_calls(recorded):
    model, _, calls = recorded
    samples = samples_of_calls(model, calls)
    assert len(samples) == 30 and samples.steps.tolist() == [step for step in range(6) for _ in range(5)]
    assert len(samples.buckets) == 1 and samples.arguments(slice(0, 2))["scale"] == 0.5
    with torch.no_grad():
        outputs = torch.cat([model(**samples.arguments(rows)) for rows in samples.batches(7)])
        torch.testing.assert_close(outputs, torch.cat([model(**call) for call in calls]))


def test_a_model_of_diffusers_is_saved_and_loaded(tmp_path):
    name = "QwenImageTransformer2DModel"
    model = build(name)
    calls = [MODELS[name][0](3)]
    quantized = stepquant.quantize_model(model, calls, "w8a8", "minmax")
    quantized.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        expected = quantized(**calls[0]).sample
        assert torch.equal(loaded(**calls[0]).sample, expected)
        assert (expected - model(**calls[0]).sample).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([], "calls is empty"),
        ([{"x": torch.zeros(2, 5, 4)}], "a call has the arguments x; expected one named t"),
    ],
)
def test_unusable_calls(recorded, calls, message):
    with pytest.raises(StepquantError, match=message):
        stepquant.quantize_model(recorded[0], calls, "w8a8", "minmax")


def test_samples_that_depend_on_each_other_are_rejected():
    class Mixing(Denoiser):
        def forward(self, x, t, positions, scale=1.0):
            return super().forward(x + x.sum(dim=0, keepdim=True), t, positions, scale)

    calls: list[dict[str, Any]] = []
    loop(Mixing(), calls)
    with pytest.raises(StepquantError, match="does not give every output twice"):
        stepquant.quantize_model(Mixing(), calls, "w8a8", "minmax")


def test_a_recipe_that_generates_samples_needs_a_pipeline(recorded):
    with pytest.raises(StepquantError, match=r"needs the .* of a diffusers pipeline, but the model was given alone"):
        stepquant.quantize_model(recorded[0], recorded[2], "w4a8", "tdq", hyperparameters=QUICK)


def test_the_check_compares_outputs_on_calls_that_were_held_out(recorded, quality_check, monkeypatch):
    model, _, calls = recorded
    seen = []
    monkeypatch.setattr("stepquant.custom_model.run_recipe", lambda r, c: (seen.append(c.calls), run_recipe(r, c))[1])
    stepquant.quantize_model(model, calls, "w8a8", "minmax")
    samples = samples_of_calls(model, calls)
    assert len(seen[0]) == len(samples) - 4 and len(samples) == 30
    fitted = {
        tuple(x.flatten().tolist()) for index in range(26) for x in seen[0].arguments(slice(index, index + 1))["x"]
    }
    assert len(fitted) == 26
    broken = copy.deepcopy(model)
    with torch.no_grad():  # a channel that is always large, and that the next layer scales back
        broken.blocks[1].one.weight[0], broken.blocks[1].one.bias[0] = 0, 3000
        broken.blocks[1].two.weight[:, 0] /= 3000
    with pytest.warns(stepquant.LowQualityWarning, match=r"SNR .* floor 20 dB.* blame are blocks.1.two"):
        stepquant.quantize_model(broken, calls, "w8a8", "minmax")
    mended = stepquant.quantize_model(broken, calls, "w8a8", "minmax", on_low_quality="raise-bits")
    error = (loop(mended) - loop(broken)).norm() / loop(broken).norm()
    assert error < 0.03
    with pytest.raises(StepquantError, match="low quality"):
        stepquant.quantize_model(broken, calls, "w8a8", "minmax", on_low_quality="error")
