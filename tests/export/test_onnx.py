"""ONNX networks, run by onnxruntime, against the reference runtime."""

from __future__ import annotations

import copy
import io
import sys
import warnings
from collections import Counter
from statistics import median

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import stepquant as sq
from stepquant.errors import StepquantError
from stepquant.export import onnx as exporting
from stepquant.export.network import Traceable, example_arguments
from stepquant.export.onnx import OPSET, OnnxDenoiser, OnnxKernel, OnnxWeightKernel, export_onnx
from stepquant.layers.attention import QuantizedAttentionProcessor
from stepquant.layers.correction import correction_of
from stepquant.layers.quantized import quantized_modules
from stepquant.models import denoiser_name
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.runtime import prepare
from stepquant.runtime.reference import ReferenceKernel, WeightOnlyKernel
from tests.runtime.native.test_native_blocks import signal_to_noise, unet
from tests.runtime.test_runtimes import CONVOLUTIONS, SPLITS, STEPS, convolution, linear

assert unet is not None  # a fixture
TIMESTEPS = (100, 500, 900)


class _OneLayer(nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def forward(self, x, row):
        return self.kernel(x, row)


def one_thread():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def run(kernel, x, rows):
    """A kernel's outputs at `rows`, by onnxruntime."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _OneLayer(kernel), (x, torch.tensor(0)), file, dynamo=False, opset_version=OPSET, input_names=["x", "row"]
        )
    inputs = [entry.name for entry in onnx.load_from_string(file.getvalue()).graph.input]
    session = onnxruntime.InferenceSession(file.getvalue(), one_thread(), providers=["CPUExecutionProvider"])
    given = ({"x": x.numpy(), "row": torch.tensor(row).numpy()} for row in rows)
    return [torch.from_numpy(session.run(None, {key: one[key] for key in inputs})[0]) for one in given]


def check(module, x):
    """Codes and sums of every row equal the reference up to float32 rounding of the largest output."""
    for row, found in enumerate(run(OnnxKernel(module), x, range(STEPS))):
        expected = ReferenceKernel(module)(x, torch.tensor(row))
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name):
    module = convolution(**CONVOLUTIONS[name])
    check(module, torch.randn(2, module.in_channels, 9, 7))


@pytest.mark.parametrize("split", SPLITS)
def test_split_channels(split):
    check(convolution(7, 6, 3, padding=1, split=SPLITS[split], smoothed=True), torch.randn(2, 7, 6, 5))
    check(linear(split=SPLITS[split]), torch.randn(2, 5, 7))


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (3, 7)])
def test_bits(bits):
    """Values far off the grid are clamped to its ends, also below 8 bits."""
    check(linear(bits=bits, smoothed=True), torch.randn(4, 7) * 5)
    check(convolution(4, 5, 3, padding=1, bits=bits, bias=False), torch.randn(2, 4, 5, 5) * 5)


def test_weight_only():
    for module, x in (
        (linear(bits=(8, None)), torch.randn(4, 7)),
        (convolution(4, 5, 3, bits=(4, None)), torch.randn(2, 4, 6, 6)),
    ):
        (found,) = run(OnnxWeightKernel(module), x, [0])
        torch.testing.assert_close(found, WeightOnlyKernel(module)(x, torch.tensor(0)))


@pytest.fixture(scope="module")
def exported(unet, tmp_path_factory):
    """The file, alone in its folder."""
    path = tmp_path_factory.mktemp("onnx") / "unet.onnx"
    assert export_onnx(unet, {"sample": torch.randn(2, 1, 16, 16), "timestep": torch.tensor(500.0)}, path) == [
        "conv_in"
    ]
    return path


@torch.no_grad()
def test_network(unet, exported):
    """The result of each step, for any batch; a code at a tie changes a few later ones."""
    assert list(exported.parent.iterdir()) == [exported]
    reference, denoiser = copy.deepcopy(unet), OnnxDenoiser(exported, unet, threads=1)
    prepare(reference, "reference")
    sample = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    decibels = []
    for timestep in TIMESTEPS:
        for x in (sample, sample[:1], sample.repeat(2, 1, 1, 1) * 0.9):
            decibels.append(signal_to_noise(denoiser(x, timestep).sample, reference(x, timestep).sample))
    assert median(decibels) > 80
    assert min(decibels) > 25
    assert signal_to_noise(denoiser(sample, 100).sample, reference(sample, 900).sample) < 25


def test_every_product_runs_in_integers(unet, exported, tmp_path):
    """In onnxruntime's optimized graph: fused scale and bias, and weights of one byte."""
    options, optimized = one_thread(), tmp_path / "optimized.onnx"
    options.optimized_model_filepath, options.log_severity_level = str(optimized), 3
    onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(optimized).graph.node)
    layers = [layer for layer in quantized_modules(unet).values() if layer.format.input]
    attentions = [module for module in unet.modules() if isinstance(module, QuantizedAttentionProcessor)]
    pieces = sum(max(1, len(layer.format.input.groups)) for layer in layers)
    assert len(attentions) > 0
    assert kinds["MatMulIntegerToFloat"] == pieces + 2 * len(attentions)
    assert kinds["Conv"] == 1  # the first, whose input is the noisy image
    assert not kinds.keys() & {"MatMul", "Gemm", "FusedMatMul", "FusedConv", "FusedGemm", "MatMulInteger"}
    weights = [tensor for tensor in onnx.load(exported).graph.initializer if len(tensor.dims) > 1]
    one_byte = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    is_table = {tensor.name: tensor.dims[0] == len(TIMESTEPS) for tensor in weights}
    integers = [tensor for tensor in weights if tensor.data_type in one_byte and not is_table[tensor.name]]
    assert len(integers) == pieces + 1  # the first layer's weight is one, too
    assert {tensor.dims[0] for tensor in weights if tensor not in integers} == {len(TIMESTEPS)}  # tables


@torch.no_grad()
def test_time_layers_and_correction_follow_the_step(unconditional_pipeline, tmp_path):
    """Layers looked up by timestep, and the output's correction, are not frozen at the example's step."""
    spec = sq.QuantSpec.parse("w8a8").model_copy(update={"exact_time": True})
    calibration = sq.Calibration(samples=8, steps=4)
    pipeline = sq.quantize(
        unconditional_pipeline, spec, recipe="minmax", calibration=calibration, correction=True, backend="reference"
    )
    correction_of(pipeline.unet).gain.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0]))
    pipeline.unet(torch.randn(2, 1, 16, 16), 500)  # what is remembered is nothing to export
    export_onnx(pipeline.unet, example_arguments(pipeline), tmp_path / "unet.onnx")
    exported, x = OnnxDenoiser(tmp_path / "unet.onnx", pipeline.unet, threads=1), torch.randn(2, 1, 16, 16)
    for timestep in (0, 250, 500, 750):
        assert signal_to_noise(exported(x, timestep).sample, pipeline.unet(x, timestep).sample) > 30


@pytest.mark.parametrize("kind", ["class", "text"])
def test_in_a_pipeline(kind, request, tmp_path):
    """Labels and prompts, with both halves of guidance in a batch."""
    full = request.getfixturevalue(f"{kind}_pipeline")
    calibration = sq.Calibration(samples=4, steps=2)
    pipeline = sq.quantize(full, "w8a8", recipe="minmax", calibration=calibration, backend="reference")
    name = denoiser_name(pipeline)
    wanted = make_request(pipeline, 2)
    expected = generate(pipeline, wanted, range(3), seed=0)
    path = tmp_path / "network.onnx"
    export_onnx(getattr(pipeline, name), example_arguments(pipeline), path)
    setattr(pipeline, name, OnnxDenoiser(path, getattr(pipeline, name), threads=1))
    found = generate(pipeline, wanted, range(3), seed=0)
    assert float((found - expected).square().mean()) < 1e-3 * float(expected.square().mean())


def test_unsupported_calls(unet, exported):
    denoiser, x = OnnxDenoiser(exported, unet, threads=1), torch.randn(2, 1, 16, 16)
    with pytest.raises(StepquantError, match="several timesteps: an exported network takes one"):
        denoiser(x, torch.tensor([1, 2]))
    with pytest.raises(StepquantError, match="does not take 'class_labels': export it from a pipeline"):
        denoiser(x, 1, class_labels=torch.tensor([0, 0]))
    with pytest.raises(StepquantError, match="needs 'sample'"):
        denoiser(timestep=1)


def test_full_precision_is_refused(unconditional_pipeline, tmp_path):
    with pytest.raises(StepquantError, match="not quantized"):
        Traceable(unconditional_pipeline.unet, [], lambda layer: None)


def test_damaged_network(unet, tmp_path):
    (tmp_path / "unet.onnx").write_bytes(b"not a network")
    with pytest.raises(StepquantError, match=r"onnxruntime cannot read .*unet\.onnx: "):
        OnnxDenoiser(tmp_path / "unet.onnx", unet)


def test_failed_export_leaves_no_files(unet, tmp_path, monkeypatch):
    arguments = {"sample": torch.randn(2, 1, 16, 16), "timestep": torch.tensor(500.0)}
    path = tmp_path / "unet.onnx"
    path.write_bytes(b"the one before")

    def full_disk(path, data):
        path.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(OnnxKernel, "forward", lambda self, x, row: torch.special.bessel_j0(x))
        with pytest.raises(StepquantError, match="torch cannot write this network as ONNX: "):
            export_onnx(unet, arguments, path)
    monkeypatch.setattr(torch.onnx, "export", lambda model, values, file, **_options: file.write(bytes(1000)))
    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.write_bytes", full_disk)
        with pytest.raises(StepquantError, match=r"no space left on the disk while writing .*unet\.onnx"):
            export_onnx(unet, arguments, path)
    monkeypatch.setattr(exporting, "MOST_BYTES", 999)
    with pytest.raises(StepquantError, match="larger than the 2 GB of an ONNX file: export it to openvino"):
        export_onnx(unet, arguments, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"the one before"


def test_missing_extra(unet, tmp_path, monkeypatch):
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(StepquantError, match=r"onnx is not installed: pip install 'stepquant\[onnx\]'"):
        export_onnx(unet, {}, tmp_path / "unet.onnx")
    with pytest.raises(StepquantError, match=r"onnxruntime is not installed: pip install 'stepquant\[onnx\]'"):
        OnnxDenoiser(tmp_path / "unet.onnx", unet)
