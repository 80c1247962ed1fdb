"""torch.compile on a quantized denoiser: the same images. Kernels are called as they are, and break the graph."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

import stepquant
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.runtime import native

SMALL = stepquant.Calibration(samples=4, steps=2)


def images(pipeline):
    return generate(pipeline, make_request(pipeline, 2, prompts=["a"]), [0], 0)


def function(pipeline):
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")


def method(pipeline):
    pipeline.unet.compile(backend="eager")


@pytest.mark.parametrize(
    "bits, arguments, compiled, kernels",
    [
        ("w8a8", {"recipe": stepquant.recipes.TDQ(iterations=1)}, function, True),  # a row per timestep
        ("w8a16", {"recipe": "minmax"}, method, False),
    ],
)
def test_compiled_denoiser_generates_the_same_images(bits, arguments, compiled, kernels, text_pipeline):
    """Traced, but run without a compiler behind it, which would take minutes; ``benchmarks/compiled.py`` has one."""
    pipeline = stepquant.quantize(text_pipeline, bits, calibration=SMALL, **arguments)
    expected = images(pipeline)
    torch.compiler.reset()
    counters.clear()
    compiled(pipeline)
    for _ in range(2):
        assert torch.allclose(images(pipeline), expected, atol=1e-5)
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    # The clock reads its timestep (Tensor.item), and integer kernels are excluded from tracing.
    reasons = list(counters["graph_break"])
    assert any("torch.compiler.disable" in reason for reason in reasons) == (kernels and native.supported() is None)
    assert all("torch.compiler.disable" in reason or "Tensor.item" in reason for reason in reasons)
