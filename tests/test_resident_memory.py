from __future__ import annotations

import pytest
import torch

from stepquant import memory
from stepquant.errors import StepquantError


def test_peak_memory_grows_with_allocations(monkeypatch, tmp_path):
    before = memory.peak_resident_bytes()
    allocated = torch.ones(before // 4 + 1)  # float32: as much as the peak so far
    assert memory.peak_resident_bytes() > before
    assert memory.resident_bytes() > allocated.nbytes
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")  # as on macOS
    assert memory.peak_resident_bytes() > allocated.nbytes


def test_a_failing_measurement_is_reported_in_one_line():
    with pytest.raises(StepquantError, match=r"^the memory of net could not be measured: .*No module named .*nowhere$"):
        memory.run_in_process("stepquant.nowhere", [], "net")
