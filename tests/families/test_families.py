"""Quantize, save, load and run every family once; `tests.families.table` checks more."""

from __future__ import annotations

import pytest

import stepquant as sq
from stepquant.errors import StepquantError
from tests.families.checks import Case
from tests.families.registry import FAMILIES

FAILS = {
    "Stable Cascade decoder": "`diffusers` has no class `PaellaVQModel`",
}
"""Families that diffusers cannot load after it saved them -> why, in the error's words."""


@pytest.mark.parametrize("name", FAMILIES)
def test_quantizes_loads_and_generates(name, tmp_path):
    for package in FAMILIES[name].requires:
        pytest.importorskip(package)
    case = Case(FAMILIES[name], tmp_path, samples=4)
    if name in FAILS:
        assert case.sample() == "yes"
        with pytest.raises(StepquantError, match=FAILS[name]):
            sq.load(case.saved)
        return
    case.quantized = sq.load(case.saved)
    assert case.sample() == "yes"
