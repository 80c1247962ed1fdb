"""Selection of CUDA kernels, moving between devices, compilation and CUDA graphs."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stepquant.bench.networks import example, quantize_network
from stepquant.errors import StepquantError
from stepquant.layers.clock import StepClock
from stepquant.runtime import cuda, fallbacks, prepare
from stepquant.runtime.cuda import CudaKernel, device
from stepquant.runtime.native.fusion import restore_forward
from stepquant.runtime.reference import ReferenceKernel, WeightOnlyKernel
from tests.runtime.native.test_native_blocks import signal_to_noise
from tests.runtime.test_runtimes import SPLITS, convolution, linear

needs_triton = pytest.mark.skipif(cuda.supported() is not None, reason=str(cuda.supported()))
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).parents[3]


def pretend(tensor: torch.Tensor) -> torch.Tensor:
    """Move a tensor to a fake GPU, in `FakeTensorMode`."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_reasons_for_missing_support(no_interpreter, monkeypatch):
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert cuda.supported() == "triton is not installed (pip install 'stepquant[cuda]', on Linux)"
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: "triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.supported() == "no GPU is available, or this build of torch is for CPUs only"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    expected = "Tesla T4 has compute capability 7.5, and Triton's integer products begin with 8.0"
    assert cuda.supported() == expected
    with pytest.raises(StepquantError, match=f"backend cuda cannot run here: {expected}. Set `backend` to 'auto'"):
        prepare(nn.Sequential(), "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert cuda.supported() is None


def test_triton_is_imported_lazily():
    """In a process where importing it fails."""
    code = """
import sys
sys.modules["triton"] = None
import torch, stepquant
from stepquant.runtime import cuda, prepare
from stepquant.errors import StepquantError
try:
    prepare(torch.nn.Sequential(), "cuda")
except StepquantError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == (
        "backend cuda cannot run here: triton is not installed (pip install 'stepquant[cuda]', on Linux). "
        "Set `backend` to 'auto'.\n"
    )


@needs_triton
def test_supported_layers():
    layers = {
        "plain": convolution(4, 4, 3),
        "grouped": convolution(4, 4, 3, groups=2),
        "grouped and split": convolution(4, 4, 3, groups=2, split=((1, 1), ())),
        "weights": linear(bits=(8, None)),
        "four bits": linear(bits=(4, 4)),
    }
    model = nn.ModuleDict(layers).to(GPU)
    assert prepare(model, "cuda") == "cuda"
    assert fallbacks(model) == ["grouped and split", "weights"]
    assert isinstance(model["four bits"].kernel, CudaKernel)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_auto_on_a_cpu_selects_no_cuda_kernel():
    model = nn.Sequential(linear())
    assert prepare(model, "auto") != "cuda"
    assert not isinstance(model[0].kernel, CudaKernel)


class Claimed(ReferenceKernel):
    """Stands in for a kernel that needs a GPU."""

    def integers(self) -> torch.Tensor:
        return self.weight_0.to(torch.int8)


def test_auto_on_a_gpu_selects_cuda_kernels(monkeypatch):
    """Without a GPU: the layer's device is patched."""
    model = nn.Sequential(linear(), convolution(4, 4, 3, bits=(4, None)))
    monkeypatch.setattr(type(model[0]), "device", torch.device("cuda", 0))
    monkeypatch.setattr(nn.Module, "to", lambda self, *_args, **_more: self)
    monkeypatch.setattr("stepquant.runtime.CudaKernel", Claimed)
    monkeypatch.setitem(sys.modules["stepquant.runtime"].KERNELS, "cuda", Claimed)
    chosen = {}
    for reason in ("no such GPU", None):
        monkeypatch.setitem(sys.modules["stepquant.runtime"].INTEGER, "cuda", lambda reason=reason: reason)
        chosen[reason] = prepare(model, "auto")
    assert chosen == {"no such GPU": "reference", None: "cuda"}
    assert isinstance(model[0].kernel, Claimed) and isinstance(model[1].kernel, WeightOnlyKernel)
    assert prepare(model, "reference") == "reference"


def test_moved_layer_gets_a_new_kernel():
    """To a fake device; codes stay on the CPU, since a kernel there has the weight in another layout."""
    module = linear()
    prepare(module, "reference")
    original, made = module.kernel, []
    module.make_kernel = lambda layer: made.append(layer.device) or nn.Identity()
    other = copy.deepcopy(module)
    with FakeTensorMode(allow_non_fake_inputs=True):
        module._apply(pretend)
        module._apply(pretend)  # it is there already
    assert [str(place) for place in made] == ["cuda:0"]
    assert module.weight_scale.device.type == "cuda" and module.weight_packed.device.type == "cpu"
    assert isinstance(module.kernel, nn.Identity)
    assert other.kernel is original, "a copy that stayed keeps the kernel that both had"
    other.half()
    assert len(made) == 1, "another dtype is not another device"


@needs_triton
@pytest.mark.parametrize("kind", ["cuda", "reference", "weights"])
@pytest.mark.parametrize("split", SPLITS)
def test_step_does_not_synchronize(kind, split):
    """On the meta device: all operands are there and no value is read, so a CUDA graph can capture it."""
    bits = (4, None) if kind == "weights" else (4, 8)
    split = ((), ()) if kind == "weights" else SPLITS[split]
    make = {"cuda": CudaKernel, "reference": ReferenceKernel, "weights": WeightOnlyKernel}[kind]
    clock = StepClock(torch.arange(3).float())
    for module, shape in (
        (convolution(7, 6, 3, padding=1, split=split, bits=bits), (2, 7, 6, 5)),
        (linear(split=split, bits=bits), (2, 3, 7)),
    ):
        kernel = make(module).to("meta")
        for time in (torch.empty((), device="meta"), torch.empty(2, device="meta", dtype=torch.int64)):
            clock.set(time)
            assert clock.row.is_meta and clock.row.shape == time.shape
            y = kernel(torch.empty(shape, device="meta", dtype=torch.bfloat16), clock.row)
            assert y.is_meta and y.dtype == torch.bfloat16
        expected = ReferenceKernel(module) if kind == "cuda" else make(module)
        assert y.shape == expected(torch.randn(shape), torch.tensor(0)).shape


@needs_triton
@torch.no_grad()
def test_denoiser(unconditional_pipeline):
    """Fused and layer by layer, outputs agree with the reference up to rounding and a few codes at ties."""
    full = copy.deepcopy(unconditional_pipeline.unet)
    quantized = quantize_network(full, example(full, 2), "w4a8", 3)
    seen = []
    for name, module in quantized.named_modules():
        if isinstance(module, nn.GroupNorm) and "attentions" not in name:
            module.register_forward_hook(lambda _module, _args, _output, name=name: seen.append(name))
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([999.0, 0.0])
    prepare(quantized, "reference")
    expected = quantized(x, time).sample
    quantized.to(GPU)
    assert prepare(quantized, "cuda") == "cuda"
    seen.clear()
    found = quantized(x.to(GPU), time.to(GPU)).sample.cpu()
    assert seen == ["conv_norm_out"]
    assert median(signal_to_noise(*pair) for pair in zip(found, expected, strict=True)) > 45
    for block in quantized.modules():
        restore_forward(block)
    alone = quantized(x.to(GPU), time.to(GPU)).sample.cpu()
    assert len(seen) > 5
    assert median(signal_to_noise(*pair) for pair in zip(alone, expected, strict=True)) > 45


@needs_triton
def test_kernels_compile_for_gpus():
    """Without a GPU or the interpreter: into integer tensor instructions with asynchronous copies."""
    command = [sys.executable, "-m", "benchmarks.cuda_compile", "--capability", "80", "--tiles", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    products = [row for row in rows if "tile" in row]
    assert (len(products), len(rows)) == (4, 6)
    assert all(row["integer_tensor_instructions"] and row["asynchronous_copies"] for row in products)


@needs_triton
def test_operators_pass_opcheck():
    """Schemas and fake implementations match; no argument is mutated or returned."""
    module, split = convolution(6, 5, 3, padding=1, bits=(4, 8)), linear(7, 5)
    kernel, flat = CudaKernel(module).to(GPU), CudaKernel(split).to(GPU)
    x, row = torch.randn(2, 12, 6, device=GPU), torch.tensor([1], device=GPU)
    checked = ("test_schema", "test_faketensor")
    quantize = (x, row, kernel.scale, kernel.zero_point, 0, 8, None, None, None, True)
    torch.library.opcheck(torch.ops.stepquant.quantize.default, quantize, test_utils=checked)
    weight, bias = torch.randn(6, device=GPU), torch.randn(6, device=GPU)
    torch.library.opcheck(torch.ops.stepquant.group_norm.default, (x, weight, bias, 3, 1e-5), test_utils=checked)
    codes, invalid = torch.ops.stepquant.quantize(*quantize)

    def common(kernel):
        piece = kernel.pieces[0]
        shared = (piece.weight_zero_point, piece.weight_sum, piece.weight_scale, kernel.bias, row)
        return (*shared, kernel.scale, kernel.zero_point, 0)

    image = (
        codes.view(2, 4, 3, 6), invalid, kernel.pieces[0].weight, *common(kernel), None, None, 1.0, 3, [1, 1], [1, 1],
        [1, 1], 1, 1, [4, 3], torch.float16,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.stepquant.convolution.default, image, test_utils=checked)
    codes = torch.zeros(4, 7, dtype=torch.int8, device=GPU)
    product = (
        codes,
        torch.zeros(2, device=GPU),
        flat.pieces[0].weight.flatten(1),
        *common(flat),
        None,
        2.0,
        torch.float16,
    )
    torch.library.opcheck(torch.ops.stepquant.matmul.default, product, test_utils=checked)


@needs_triton
def test_torch_compile_without_graph_breaks():
    """One graph, which reads the clock's row in each call."""
    model = nn.Sequential(convolution(4, 6, 3, padding=1), nn.SiLU(), convolution(6, 4, 1, bits=(4, 8))).to(GPU)
    prepare(model, "cuda")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 5, 5, device=GPU)
    with torch.no_grad():
        results = []
        for step in (0, 2):
            for layer in model[::2]:
                layer.clock.set(torch.tensor(float(step), device=GPU))
            assert torch.equal(compiled(x), model(x))
            results.append(model(x))
    assert not torch.equal(*results)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_runs_any_step():
    module = convolution(4, 6, 3, padding=1)
    prepare(module.cuda(), "cuda")
    x, time = torch.randn(2, 4, 5, 5, device=GPU), torch.zeros((), device=GPU)

    def step():
        module.clock.set(time)
        return module(x)

    with torch.no_grad():
        step()  # tiles are chosen before
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step()
        for index in (2, 0, 1):
            time.fill_(index)
            graph.replay()
            assert torch.equal(y, step())
