"""A pipeline of a modern family in the native runtime, against the reference."""

from __future__ import annotations

import pytest
import torch

from stepquant.runtime import fallbacks, native, prepare, summary
from tests.families.checks import Case, copied, tensors
from tests.families.registry import FAMILIES


@torch.no_grad()
def test_wan_in_integers(tmp_path):
    """Every layer but the first, and self-attention and cross-attention of both blocks."""
    if (reason := native.supported()) is not None:
        pytest.skip(reason)
    case = Case(FAMILIES["Wan 2.1"], tmp_path, samples=2)
    model = case.quantized.transformer
    outputs = {}
    for backend in ("native", "reference"):
        prepare(model, backend)
        outputs[backend] = [
            x for args, kwargs, _ in case.calls["transformer"] for x in tensors(model(*copied(args), **copied(kwargs)))
        ]
        if backend == "native":
            assert fallbacks(model) == ["patch_embedding"] and "attentions: 4 native" in summary(model)
    for found, expected in zip(outputs["native"], outputs["reference"], strict=True):
        assert (found - expected).norm() <= 1e-3 * expected.norm()
    prepare(model, "native")
    assert all(x.isfinite().all() for x in case.run(case.quantized))
