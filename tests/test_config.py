import pytest

from stepquant.calibration.samples import Calibration
from stepquant.config import LayerBits, QuantSpec
from stepquant.errors import StepquantError


@pytest.mark.parametrize("text, bits", [("w4a8", (4, 8)), ("W8A8", (8, 8)), (" w4a16 ", (4, 16)), ("w6a6", (6, 6))])
def test_bits_are_parsed(text, bits):
    assert LayerBits.parse(text) == bits


@pytest.mark.parametrize("text", ["", "8", "w4", "w4a", "a8w8", "w1a8", "w9a8", "w4a12", "w16a8", "w-4a8", None, 8])
def test_unsupported_bits_are_rejected(text):
    with pytest.raises(StepquantError, match="bits"):
        LayerBits.parse(text)


def test_first_and_last_layer_get_more_bits_unless_overridden():
    spec = QuantSpec.parse({"bits": "w4a4", "overrides": {r"mid_block\.": "w6a8", "conv_out": "w4a4"}})
    assert spec.layer_bits("down_blocks.0.conv") == (4, 4)
    assert spec.layer_bits("conv_in", first=True) == (8, 16)
    assert spec.layer_bits("proj_out", last=True) == (8, 8)
    assert spec.layer_bits("conv_out", last=True) == (4, 4)
    assert spec.layer_bits("mid_block.resnets.0.conv1") == (6, 8)


def test_the_first_matching_override_applies():
    spec = QuantSpec.parse({"bits": "w4a8", "overrides": {"conv1": "w8a8", "conv": "w2a8"}})
    assert spec.layer_bits("a.conv1").weight == 8
    assert spec.layer_bits("a.conv2").weight == 2


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bits": "w4a8", "group_size": 24}, "group_size"),
        ({"bits": "w4a8", "softmax_bits": 12}, "softmax_bits"),
        ({"bits": "w4a8", "first_last_bits": 1}, "first_last_bits"),
        ({"bits": "w4a8", "overrides": {"(": "w8a8"}}, "regular expression"),
        ({"bits": "w4a8", "overrides": {"a": "w99a8"}}, "w99a8"),
        ({"bits": "w4a8", "colour": 1}, "colour"),
        ({}, "bits"),
    ],
)
def test_an_invalid_spec_is_reported_in_one_line(fields, message):
    with pytest.raises(StepquantError, match=message) as caught:
        QuantSpec.parse(fields)
    assert "\n" not in str(caught.value)
    with pytest.raises(StepquantError) as constructed:
        QuantSpec(**fields)
    assert str(constructed.value) == str(caught.value)


def test_an_invalid_calibration_is_reported_in_one_line():
    message = "calibration: steps: Input should be greater than 0 (given: 0)."
    for make in (lambda: Calibration(steps=0), lambda: Calibration.parse({"steps": 0})):
        with pytest.raises(StepquantError) as caught:
            make()
        assert str(caught.value) == message
