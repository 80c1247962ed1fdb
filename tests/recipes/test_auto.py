from __future__ import annotations

import pytest

import stepquant
from stepquant.errors import StepquantError
from stepquant.layers.quantized import quantized_modules
from stepquant.progress import Progress
from stepquant.recipes import Auto, with_target
from stepquant.saving import provenance_of

SMALL = {"samples": 8, "steps": 2}


class Notes(Progress):
    def __init__(self):
        self.lines = []

    def note(self, message):
        self.lines.append(message)


def test_the_measured_activations_are_taken_and_printed(unconditional_pipeline):
    notes = Notes()
    quantized = stepquant.quantize(unconditional_pipeline, "w8a4", recipe="auto", calibration=SMALL, progress=notes)
    line = next(line for line in notes.lines if line.startswith("auto: activations"))
    found = dict(part.rsplit(" ", 2)[:2] for part in line.split(": ", 2)[2].split("; ")[0].split(", "))
    assert list(found) == ["static", "per-step", "dynamic"]
    best = max(found, key=lambda name: float(found[name]))
    taken = line.rsplit("; ", 1)[1].removesuffix(" are taken.")
    assert float(found[taken]) >= float(found[best]) - 0.5
    spec = provenance_of(quantized.unet)["spec"]
    assert spec["activations"] == ("dynamic" if taken == "dynamic" else "static")


def stored_share(pipeline, unet):
    """Bits of all tensors of a quantized model, relative to 32 for each parameter."""
    before = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    stored = sum(tensor.numel() * tensor.element_size() for tensor in unet.state_dict().values())
    return stored / (4 * before)


@pytest.mark.usefixtures("small_ranking")
def test_a_size_is_met_with_eight_bits_for_the_layers_that_suffer(unconditional_pipeline):
    given = {"target": {"size": "0.27x"}, "calibration": SMALL, "hyperparameters": {"activations": "dynamic"}}
    quantized = stepquant.quantize(unconditional_pipeline, "w8a8", **given)
    bits = {module.format.weight.bits for module in quantized_modules(quantized.unet).values()}
    assert bits == {4, 8}
    assert stored_share(unconditional_pipeline, quantized.unet) == pytest.approx(0.27, abs=0.01)
    assert provenance_of(quantized.unet)["recipe"] == "auto"
    with pytest.raises(StepquantError, match=r"size of recipe auto is 0\.1; expected at least 0\.175"):
        stepquant.quantize(unconditional_pipeline, "w8a8", target={"size": 0.1}, calibration=SMALL)
    smallest = stepquant.quantize(unconditional_pipeline, "w8a8", **given | {"target": {"size": 0.176}})
    assert stored_share(unconditional_pipeline, smallest.unet) == pytest.approx(0.176, abs=0.01)


@pytest.mark.usefixtures("quality_check")
def test_a_psnr_is_reached_with_some_layers_above_four_bits(unconditional_pipeline):
    given = {"calibration": SMALL, "hyperparameters": {"activations": "dynamic"}}
    quantized = stepquant.quantize(unconditional_pipeline, "w8a8", target={"psnr": 42}, **given)
    found = provenance_of(quantized.unet)
    assert found["check"]["floor"] == 42 and sum(found["check"]["decibels"]) / 4 >= 42
    counts = [module.format.weight.bits for module in quantized_modules(quantized.unet).values()]
    assert 0 < counts.count(4) < len(counts) and found["raised"]
    with pytest.raises(StepquantError, match=r"psnr=42 takes 0\.2"):
        stepquant.quantize(unconditional_pipeline, "w8a8", target={"psnr": 42, "size": 0.21}, **given)


def test_targets_are_checked():
    assert with_target(None, None) == ("q-diffusion", {})
    assert with_target(None, {"size": "0.2x"}) == ("auto", {"size": 0.2})
    assert with_target(Auto(), {"psnr": "30"})[1] == {"psnr": 30.0}
    with pytest.raises(StepquantError, match="recipe 'minmax' has no target"):
        with_target("minmax", {"psnr": 30})
    for wrong in ({"speed": 2}, {"size": "small"}):
        with pytest.raises(StepquantError, match=r"expected psnr=DB, such as 30, or size=0\.2x"):
            with_target(None, wrong)


def test_a_target_of_quality_needs_the_check(unconditional_pipeline):
    with pytest.raises(StepquantError, match="a target psnr needs the check"):
        stepquant.quantize(unconditional_pipeline, "w8a8", target={"psnr": 30}, calibration=SMALL, check=False)
