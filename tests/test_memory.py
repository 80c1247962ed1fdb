from __future__ import annotations

import torch

from stepquant import memory


def test_peak_memory_grows_with_allocations(monkeypatch, tmp_path):
    before = memory.peak_resident_bytes()
    allocated = torch.ones(before // 4 + 1)  # float32: as much as the peak so far
    assert memory.peak_resident_bytes() > before
    assert memory.resident_bytes() > allocated.nbytes
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")  # as on macOS
    assert memory.peak_resident_bytes() > allocated.nbytes
