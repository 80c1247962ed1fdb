import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from typer.testing import CliRunner

import stepquant
from stepquant.cli.main import app
from stepquant.errors import StepquantError
from stepquant.layers.interception import quantized_attentions
from stepquant.layers.linear import QuantizedLinear
from stepquant.layers.quantized import quantized_modules
from stepquant.recipes import Recipe, Stage
from stepquant.recipes.stages import AddQuantizers, CalibrateRanges, CollectSamples
from stepquant.runtime import fallbacks, prepare
from stepquant.runtime.reference import ReferenceKernel
from stepquant.user_code import load_function

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_runtime.py"
int_matmul = load_function(f"{EXAMPLE}:int_matmul", "runtime")


class PerStep(Recipe):
    """Per-step scales, so that the kernel uses several rows."""

    def stages(self) -> list[Stage]:
        return [
            CollectSamples(),
            AddQuantizers(weight_range="minmax", rows="calibrated"),
            CalibrateRanges(method="minmax"),
        ]


@pytest.fixture(scope="module")
def quantized(unconditional_pipeline):
    calibration = stepquant.Calibration(samples=8, steps=4)
    return stepquant.quantize(
        unconditional_pipeline, "w4a8", recipe=PerStep(), calibration=calibration, backend=int_matmul
    )


@pytest.mark.parametrize("time", [torch.tensor(0), torch.tensor([0, 750, 250])], ids=["one step", "mixed steps"])
@pytest.mark.parametrize("shape", [(3, -1), (3, 5, -1)])
def test_the_kernel_equals_the_reference_bit_for_bit(quantized, time, shape):
    layers = {
        name: module
        for name, module in quantized_modules(quantized.unet).items()
        if type(module.kernel).__name__ == "IntMatmul"
    }
    assert layers and any(module.format.input and module.format.input.rows > 1 for module in layers.values())
    for module in layers.values():
        module.clock.set(time)
        x = torch.randn(*shape[:-1], module.in_features) * 3
        assert torch.equal(module.kernel(x, module.clock.row), ReferenceKernel(module)(x, module.clock.row))


def test_layers_without_a_kernel_use_the_reference(quantized):
    modules = quantized_modules(quantized.unet)
    without = [n for n, m in modules.items() if not isinstance(m, QuantizedLinear)]
    assert fallbacks(quantized.unet) == without + list(quantized_attentions(quantized.unet))
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        mine = quantized.unet(x, 500).sample
        assert prepare(quantized.unet, "reference") == "reference"
        expected = quantized.unet(x, 500).sample
        assert prepare(quantized.unet, int_matmul) == "int_matmul"
        assert torch.equal(mine, expected) and torch.equal(mine, quantized.unet(x, 500).sample)


def test_a_checkpoint_loads_with_the_custom_runtime(quantized, tmp_path):
    stepquant.save(quantized, tmp_path / "model")
    loaded = stepquant.load(tmp_path / "model", backend=int_matmul)
    assert fallbacks(loaded.unet) == fallbacks(quantized.unet)


def test_an_object_that_is_not_a_kernel_is_rejected(quantized):
    with pytest.raises(StepquantError, match=r"gave layer .* a Linear: expected a Kernel, or None"):
        prepare(quantized.unet, lambda module: torch.nn.Linear(1, 1))


def test_the_command_accepts_a_custom_runtime(quantized, tmp_path):
    stepquant.save(quantized, tmp_path / "model")
    arguments = ["sample", str(tmp_path / "model"), "--count", "1", "--steps", "2", "--out", str(tmp_path / "grid.png")]
    done = CliRunner().invoke(app, [*arguments, "--backend", f"{EXAMPLE}:int_matmul"])
    assert done.exit_code == 0 and (tmp_path / "grid.png").is_file(), done.output
    for backend, message in (("none.py:mine", "no runtime file 'none.py'"), ("magic", "unknown backend 'magic'")):
        done = CliRunner().invoke(app, [*arguments, "--backend", backend])
        assert done.exit_code == 2 and message in done.stderr


def test_a_checkpoint_cannot_name_a_custom_runtime(quantized, tmp_path):
    """Only code named by the user is executed, not code named by a file."""
    quantized.unet.save_pretrained(tmp_path / "unet")
    path = tmp_path / "unet" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["backend"] = f"{EXAMPLE}:int_matmul"
    path.write_text(json.dumps(config))
    with pytest.raises(StepquantError, match="unknown backend"):
        UNet2DModel.from_pretrained(tmp_path / "unet")
