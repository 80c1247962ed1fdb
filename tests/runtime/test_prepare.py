"""Which kernel `prepare` gives each layer of a model, and what it warns about."""

from __future__ import annotations

import copy
import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import stepquant
from stepquant.errors import StepquantError
from stepquant.export.onnx import OnnxKernel, OnnxWeightKernel
from stepquant.export.openvino import FoldedKernel
from stepquant.layers.kernel import Capabilities
from stepquant.runtime import INTEGER, fallbacks, native, prepare, summary
from stepquant.runtime.cuda import CudaKernel
from stepquant.runtime.native.fusion import is_fused, is_unchanged
from stepquant.runtime.onednn import OneDnnKernel
from stepquant.runtime.reference import ReferenceKernel, WeightOnlyKernel
from tests.runtime.test_runtimes import BACKENDS_HERE, convolution, fill, linear

LAYERS = {
    "plain": lambda: linear(),
    "smoothed": lambda: linear(smoothed=True),
    "split": lambda: linear(split=((2, 5), (3, 4))),
    "grouped": lambda: convolution(4, 4, 3, groups=2),
    "grouped and split": lambda: convolution(4, 4, 3, groups=2, split=((1, 1), ())),
    "weight-only": lambda: linear(bits=(4, None)),
    "weight-only, split": lambda: linear(bits=(4, None), split=((2, 5), ())),
    "too wide": lambda: too_wide(),
}
INTEGER_LAYERS = set(LAYERS) - {"weight-only", "weight-only, split"}
SUPPORTED = {
    ReferenceKernel: INTEGER_LAYERS,
    WeightOnlyKernel: {"weight-only", "weight-only, split"},
    OneDnnKernel: {"plain", "smoothed", "split"},
    native.NativeKernel: {"plain", "smoothed", "split", "grouped"},
    CudaKernel: {"plain", "smoothed", "split", "grouped"},
    OnnxKernel: {"plain", "smoothed", "split"},
    OnnxWeightKernel: {"weight-only"},
    FoldedKernel: {"plain", "smoothed", "grouped", "too wide"},
}


def too_wide():
    """A linear of so many inputs that the sum of the largest products is beyond 2^31."""
    module = linear(inputs=4)
    module.weight_shape = (1, math.ceil((1 << 31) / (255 * 128)) + 1)
    return module


@pytest.mark.parametrize("kernel", SUPPORTED)
def test_kernels_support_the_layers_they_declare(kernel):
    assert {name for name, layer in LAYERS.items() if kernel.supports(layer())} == SUPPORTED[kernel]


def test_unsupported_transform_falls_back_to_the_reference(monkeypatch):
    monkeypatch.setitem(INTEGER, "onednn", lambda: None)
    monkeypatch.setattr(OneDnnKernel, "capabilities", Capabilities(transforms=frozenset()))
    model = nn.ModuleDict({"plain": linear(), "smoothed": linear(smoothed=True)})
    with pytest.warns(
        UserWarning, match="without an integer kernel in onednn, layers run in the slow reference: smoothed"
    ):
        prepare(model, "onednn")
    assert isinstance(model["plain"].kernel, OneDnnKernel) and isinstance(model["smoothed"].kernel, ReferenceKernel)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS_HERE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_has_the_dtype_of_the_input(backend, dtype):
    model = nn.Sequential(convolution(4, 5, 3), convolution(5, 4, 3, bits=(4, None)))
    prepare(model, backend)
    x = torch.randn(1, 4, 8, 8).to(dtype)
    wide = model(x.float())
    model.to(dtype)
    y = model(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), wide, atol=0.03 * float(wide.abs().max()), rtol=0)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS_HERE])
@pytest.mark.parametrize("batch", [1, 3])
def test_timesteps_of_other_samples(backend, batch):
    model = nn.Sequential(convolution(4, 5, 3))
    prepare(model, backend)
    model[0].clock.set(torch.tensor([0.0, 2.0]))
    with pytest.raises(StepquantError, match=f"2 timesteps were given for a batch of {batch}"):
        model(torch.randn(batch, 4, 8, 8))


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_fallbacks_are_named(backend):
    model = nn.ModuleDict(
        {
            "plain": convolution(4, 4, 3),
            "grouped": convolution(4, 4, 3, groups=2),
            "weights": linear(bits=(8, None)),
        }
    )
    assert prepare(model, backend) == backend
    assert fallbacks(model) == (["weights"] if backend == "native" else ["grouped", "weights"])
    assert isinstance(model["grouped"].kernel, ReferenceKernel) == (backend != "native")


def test_kernels_are_not_in_the_state_dict():
    model = nn.Sequential(convolution(4, 4, 3), linear(), linear(smoothed=True))
    before = set(model.state_dict())
    prepare(model)
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("backend", ["reference", *BACKENDS_HERE])
def test_copies_and_threads(backend):
    """Two copies, each with its own clock and step, at the same time."""
    models = [nn.Sequential(convolution(4, 4, 3, padding=1), convolution(4, 4, 3, padding=1))]
    prepare(models[0], backend)
    models.append(copy.deepcopy(models[0]))
    for step, model in enumerate(models):
        for layer in model:
            layer.clock.set(step)
    x = torch.randn(2, 4, 8, 8)
    alone = [model(x) for model in models]
    assert not torch.equal(*alone)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            for found, expected in zip(pool.map(lambda model: model(x), models), alone, strict=True):
                assert torch.equal(found, expected)


def test_unknown_backend():
    with pytest.raises(StepquantError, match=r"unknown backend 'tpu'.*onednn"):
        prepare(nn.Sequential(), "tpu")


def test_unsupported_backend(monkeypatch):
    reasons = {name: lambda: "no such instructions" for name in INTEGER}
    monkeypatch.setattr("stepquant.runtime.INTEGER", reasons)
    for name in INTEGER:
        with pytest.raises(StepquantError, match=f"backend {name} cannot run here: no such instructions"):
            prepare(nn.Sequential(), name)
    assert prepare(nn.Sequential(), "auto") == "reference"
    reasons["onednn"] = lambda: None
    assert prepare(nn.Sequential(), "auto") == "onednn"


@pytest.mark.parametrize("backend", ["reference", *BACKENDS_HERE])
def test_layer_uses_a_state_dict_loaded_after_prepare(backend):
    first, other = (nn.Sequential(convolution(7, 5, 3, padding=1)) for _ in range(2))
    fill(other[0], (), (), (8, 8))
    x = torch.randn(2, 7, 6, 6)
    for model in (first, other):
        prepare(model, backend)
    before, wanted = first(x), other(x)
    assert not torch.equal(before, wanted)
    first.load_state_dict(other.state_dict())
    assert torch.equal(first(x), wanted)


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_model_uses_a_state_dict_loaded_after_prepare(backend, unconditional_pipeline):
    """Including attentions, fused blocks and recordings."""
    calibration = stepquant.Calibration(samples=4, steps=2)
    first, other = (
        stepquant.quantize(
            unconditional_pipeline, "w8a8", recipe="minmax", calibration=calibration, seed=seed, backend=backend
        ).unet
        for seed in (0, 1)
    )
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        for _ in range(3):
            before, wanted = first(x, 500).sample, other(x, 500).sample
        assert not torch.equal(before, wanted)
        first.load_state_dict(other.state_dict())
        for _ in range(3):
            assert torch.equal(first(x, 500).sample, wanted)
    assert all(is_unchanged(block) for block in first.modules() if is_fused(block)), "blocks are fused no longer"
    assert backend != "native" or any(is_fused(block) for block in first.modules())


def grouped() -> nn.Sequential:
    """One layer with a kernel everywhere, one without a kernel on CPUs, one with a float activation."""
    return nn.Sequential(
        convolution(8, 8, 3, padding=1),
        convolution(8, 8, 3, groups=2, split=((2, 2), ())),
        linear(6, 6, bits=(8, None)),
    )


@pytest.mark.parametrize("backend", BACKENDS_HERE)
def test_warning_names_layers_without_integer_kernel(backend):
    model = grouped()
    with pytest.warns(UserWarning) as caught:
        prepare(model, backend)
    assert [str(warning.message) for warning in caught] == [
        f"without an integer kernel in {backend}, layers run in the slow reference: 1."
    ]
    expected = f"layers: 1 {backend}, 1 reference (1), 1 floating point (2)"
    assert summary(model).split("; ")[0] == expected


def test_warning_explains_slower_runtime(monkeypatch):
    for name in ("native", "onednn"):
        monkeypatch.setitem(INTEGER, name, lambda name=name: f"no {name} today")
    model = nn.Sequential(linear())
    with pytest.warns(UserWarning) as caught:
        assert prepare(model) == "reference"
    assert [str(warning.message) for warning in caught] == [
        "stepquant uses the reference runtime, since faster ones are not available "
        "(native: no native today; onednn: no onednn today)."
    ]
    assert summary(model) == "layers: 1 reference (0); no native: no native today; no onednn: no onednn today"
    monkeypatch.setitem(INTEGER, "native", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if native.supported() is None:
            prepare(model)
            assert summary(model) == "layers: 1 native"
