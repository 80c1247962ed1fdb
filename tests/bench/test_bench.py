"""`stepquant bench`: alternating timing, ratios within rounds, memory, roofline and peers."""

from __future__ import annotations

import copy
import json
import sys
from types import ModuleType

import pytest
import torch
from diffusers import UNet2DModel
from typer.testing import CliRunner

from stepquant.bench import gpu, networks, peers
from stepquant.bench import measure as measuring
from stepquant.bench.measure import measure
from stepquant.bench.networks import example, quantize_network
from stepquant.bench.resident import measure_resident
from stepquant.bench.roofline import measure_roofline
from stepquant.cli.main import app
from stepquant.errors import StepquantError
from stepquant.runtime import cuda as runtime_cuda
from stepquant.runtime import native, prepare
from tests.runtime.native.test_native_blocks import signal_to_noise

needs_native = pytest.mark.skipif(native.supported() is not None, reason=str(native.supported()))


def test_candidates_alternate(monkeypatch):
    """A warm-up round, then medians of the second runs; the speedup is the median of the rounds' ratios."""
    now, order = [0.0], []
    durations = {"a": iter([9, 9, 9, 2, 9, 4, 9, 6]), "b": iter([9, 9, 9, 1, 9, 1, 9, 2])}
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: now[0])

    def candidate(name):
        def run():
            order.append(name)
            now[0] += next(durations[name])

        return run

    first, second = measure({name: candidate(name) for name in durations}, 3)
    assert order == ["b", "b", "a", "a", "a", "a", "b", "b"] * 2
    assert (first.times, second.times) == ([2.0, 4.0, 6.0], [1.0, 1.0, 2.0])
    assert (first.seconds, first.speedup) == (4.0, 1.0)
    assert (second.seconds, second.speedup) == (1.0, 3.0)
    assert second.speedup_quartiles == (2.0, 4.0)


@pytest.fixture
def tiny(unconditional_pipeline, monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "tiny", lambda: copy.deepcopy(unconditional_pipeline.unet))


def test_quantized_networks_have_the_requested_rows(unconditional_pipeline):
    unet = unconditional_pipeline.unet
    arguments = example(unet, 2)
    for rows in (1, 5):
        model = quantize_network(unet, arguments, "w8a8", rows)
        prepare(model, "reference")
        assert model.mid_block.resnets[0].conv1.input_scale.shape[0] == rows
        assert torch.isfinite(model(**arguments).sample).all()


@needs_native
def test_roofline_counts_every_product(unconditional_pipeline):
    unet = unconditional_pipeline.unet
    arguments = example(unet, 1)
    model = quantize_network(unet, arguments, "w8a8", 1)
    prepare(model, "native")
    expected = 0

    def count(module, _args, output):
        nonlocal expected
        expected += 2 * output.numel() * module.weight[0].numel()

    handles = [
        module.register_forward_hook(count)
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Conv2d) and name != "conv_in"
    ]
    unet(**arguments)
    for handle in handles:
        handle.remove()
    peak, shares = measure_roofline(model, arguments, rounds=1)
    by_part = {share.part: share for share in shares}
    assert peak > 0
    assert by_part["convolutions"].operations == expected
    assert sum(share.share_of_time for share in shares) == pytest.approx(1)


def test_the_command(tiny, tmp_path):
    out = tmp_path / "figures.json"
    result = CliRunner().invoke(app, ["bench", "arch:tiny", "--batch", "1", "--rounds", "2", "--json", str(out)])
    assert result.exit_code == 0, result.output
    figures = json.loads(out.read_text())
    names = [timing["name"] for timing in figures["timings"]]
    assert names[0] == "torch eager float32"
    assert names[1:] == [
        f"stepquant w8a8, {figures['backend']}, {kind}" for kind in ("per-step scales", "static scales")
    ]
    assert "per-step scales" in result.output and "conv_in" in figures["fallbacks"]
    if figures["backend"] == "native":
        assert figures["fallbacks"] == ["conv_in"]


@needs_native
def test_resident_memory():
    """Slightly more than half a byte per weight."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(128, 256), layers_per_block=1, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, add_attention=False,
    )  # fmt: skip
    weights = sum(parameter.numel() for parameter in unet.parameters())
    model = quantize_network(unet, example(unet, 1), "w4a8", 2)
    prepare(model, "auto", "packed")
    measured = measure_resident("packed", model, example(unet, 1), "packed")
    assert 0.5 * weights < measured.held < 0.8 * weights
    assert measured.held <= measured.peak


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["arch:cifar-ddpm", "--memory", "folded"], "--memory is 'folded': expected unpacked or packed."),
        (
            ["arch:none"],
            "architecture 'arch:none' is unknown; expected one of arch:cifar-ddpm, arch:sd15, "
            "arch:wan, arch:qwen-image, arch:flux.",
        ),
        (
            ["arch:cifar-ddpm", "--device", "cuda", "--roofline"],
            "--roofline and --resident measure a CPU and cannot be used with --device cuda.",
        ),
        (
            ["arch:cifar-ddpm", "--bits", "w16a16"],
            "bits w16a16 leave every layer in floating point, so there is nothing to quantize; expected bits such as "
            "w8a8.",
        ),
    ],
)
def test_bad_input(arguments, sentence):
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert result.stderr == f"stepquant: {sentence}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")
def test_no_gpu():
    result = CliRunner().invoke(app, ["bench", "arch:cifar-ddpm", "--device", "cuda"])
    assert (result.exit_code, result.stderr) == (
        2, "stepquant: --device cuda cannot be used: no GPU is available. Use --device cpu.\n",
    )  # fmt: skip


def test_unavailable_peers_are_reported(tiny, tmp_path, monkeypatch):
    """Missing and failing peers are left out; the others are timed."""

    def broken(*_arguments):
        raise RuntimeError("no such instruction.\nwith a traceback")

    absent = {"openvino": None, "optimum": True, "optimum.quanto": True, "torchao": None}
    find_spec = peers.importlib.util.find_spec
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: absent.get(name, True) and find_spec)
    monkeypatch.setattr(peers, "_quanto_peers", broken)
    monkeypatch.setattr(peers, "_torch_peers", lambda model, arguments: {"another": lambda: model(**arguments)})
    out = tmp_path / "figures.json"
    command = ["bench", "arch:tiny", "--batch", "1", "--rounds", "1", "--peers", "--json", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "left out" in line]
    assert lines == [
        "OpenVINO is left out: openvino is not installed (pip install 'stepquant[bench]').",
        "optimum-quanto is left out: no such instruction.",
        "torchao is left out: torchao is not installed (pip install torchao).",
    ]
    figures = json.loads(out.read_text())
    assert figures["timings"][-1]["name"] == "another"
    assert list(figures["left_out"]) == ["OpenVINO", "optimum-quanto", "torchao"]


def test_a_single_peer(tiny, monkeypatch):
    monkeypatch.setattr(peers, "_torch_peers", lambda model, arguments: {"another": lambda: model(**arguments)})
    command = ["bench", "arch:tiny", "--batch", "1", "--rounds", "1", "--peer"]
    result = CliRunner().invoke(app, [*command, "TORCH"])
    assert result.exit_code == 0, result.output
    assert "another" in result.output and "left out" not in result.output
    result = CliRunner().invoke(app, [*command, "tensorrt"])
    assert (result.exit_code, result.stderr) == (
        2, "stepquant: peer 'tensorrt' is unknown; expected one of torch, OpenVINO, optimum-quanto, torchao.\n",
    )  # fmt: skip


@torch.no_grad()
def test_quanto(unconditional_pipeline):
    """The copy is rounded, the original unchanged."""
    pytest.importorskip("optimum.quanto")
    unet = unconditional_pipeline.unet
    arguments = example(unet, 2)
    expected = unet(**arguments).sample
    ((name, step),) = peers._quanto_peers(unet, arguments).items()
    assert name == "optimum-quanto int8"
    assert 15 < signal_to_noise(step().sample, expected) < 60
    assert torch.equal(unet(**arguments).sample, expected)


def test_torchao(unconditional_pipeline, monkeypatch):
    """A stub of the library records the configuration and the model."""
    calls = []
    stand_in = ModuleType("torchao.quantization")
    stand_in.Int8DynamicActivationInt8WeightConfig = lambda: "int8 dynamic"
    stand_in.quantize_ = lambda model, config: calls.append((model, config))
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", stand_in)
    monkeypatch.setattr(torch, "compile", lambda model: lambda **arguments: (model, arguments))
    unet = unconditional_pipeline.unet
    ((name, step),) = peers._torchao_peers(unet, {"sample": 1}).items()
    assert name == "torchao int8 (linear layers), torch.compile"
    ((quantized, config),) = calls
    assert config == "int8 dynamic"
    assert quantized is not unet
    assert step() == (quantized, {"sample": 1})


def test_unsupported_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.cuda, "supported", lambda: "its tensor cores have no integers")
    with pytest.raises(StepquantError, match="cannot be used: its tensor cores have no integers"):
        gpu.check_gpu()


def test_events_time_a_gpu(monkeypatch):
    """One event before the step and one after, in the order of the device's queue; milliseconds become seconds."""
    queue = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            queue.append(self)
            self.place = len(queue)

        def synchronize(self):
            queue.append("waited")

        def elapsed_time(self, later):
            return 1000.0 * (later.place - self.place)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    (timing,) = measure({"step": lambda: queue.append("step")}, 2, seconds_of=gpu.event_seconds)
    assert timing.times == [2.0, 2.0]
    assert [entry for entry in queue if isinstance(entry, str)] == ["step", "step", "waited"] * 3


def test_weight_bytes_include_kernels_once(unconditional_pipeline):
    """Four-bit weights in the kernels' layout, tables and float layers."""
    if runtime_cuda.supported() is not None:
        pytest.skip(runtime_cuda.supported())
    unet = unconditional_pipeline.unet
    arguments = example(unet, 1)
    half = networks.half_network(unet, torch.device("cpu"))
    assert gpu.weight_bytes(half) == 2 * sum(parameter.numel() for parameter in unet.parameters())
    layer = quantize_network(unet, arguments, "w4a8", 1).mid_block.resnets[0].conv1
    prepare(layer, "cuda")
    small = torch.nn.Sequential(layer, torch.nn.Linear(1, 1, bias=False))
    weights, outputs = 16 * 16 * 9, 16
    kernel = weights // 2 + outputs * (1 + 4 + 4 + 4) + 4 + 4 + 8  # zero point, sum, scale, bias; the grid and a row
    stored = 1 + outputs * (4 + 1 + 4) + 4 + 1
    assert gpu.weight_bytes(small) == kernel + stored + 4


def test_arguments_on_a_gpu(unconditional_pipeline):
    arguments = example(unconditional_pipeline.unet, 2) | {"class_labels": torch.tensor([1, 2])}
    found = networks.half_arguments(arguments, torch.device("cpu"))
    assert [value.dtype for value in found.values()] == [torch.bfloat16, torch.float32, torch.int64]
    assert found["sample"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("option", "value"), [("--device", "tpu"), ("--rounds", "0"), ("--batch", "0")])
def test_bad_option(option, value):
    result = CliRunner().invoke(app, ["bench", "arch:cifar-ddpm", option, value])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"stepquant: Invalid value for '{option}'") and result.stderr.count("\n") == 1


def test_the_arguments_of_a_model_are_those_of_its_pipeline(class_folder, class_pipeline):
    """Class labels among them, and one sample each without guidance."""
    model, arguments = networks.find_network(str(class_folder), 3)
    assert type(model) is type(class_pipeline.transformer)
    assert arguments["class_labels"].tolist() == [0, 1, 2] and arguments["hidden_states"].shape[0] == 3
    quantized = quantize_network(model, arguments, "w8a8", 1)
    prepare(quantized, "reference")
    assert torch.isfinite(quantized(**arguments).sample).all()
