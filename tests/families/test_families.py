"""Quantize, save, load and run every family once; `tests.families.table` checks more."""

from __future__ import annotations

import pytest

from tests.families.checks import Case
from tests.families.registry import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_quantizes_loads_and_generates(name, tmp_path):
    for package in FAMILIES[name].requires:
        pytest.importorskip(package)
    assert Case(FAMILIES[name], tmp_path, samples=4).sample() == "yes"
