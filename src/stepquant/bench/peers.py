"""Other ways to run the same network: torch eager and compiled, OpenVINO in float32, bfloat16 and int8, and the int8
of libraries that quantize torch modules."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.bench.networks import half_arguments, half_network
from stepquant.errors import StepquantError, first_line

Candidate = Callable[[], object]
"""Runs one step."""
Libraries = dict[str, tuple[tuple[str, ...], Callable[[], dict[str, Candidate]]]]
"""Name -> the packages it needs, and a function that builds its candidates."""
Built = tuple[dict[str, Candidate], dict[str, str]]
"""Name -> candidate; library -> why it cannot run here."""
PEERS = ("torch", "OpenVINO", "optimum-quanto", "torchao")
CALIBRATION_STEPS = (10.0, 500.0, 900.0)


def check_peers(names: Collection[str]) -> tuple[str, ...]:
    """The names in the spelling of `PEERS`; raises `StepquantError` for an unknown one."""
    known = {name.lower(): name for name in PEERS}
    for name in names:
        if name.lower() not in known:
            raise StepquantError(f"peer {name!r} is unknown; expected one of {', '.join(PEERS)}.")
    return tuple(known[name.lower()] for name in names)


def cpu_peers(model: nn.Module, arguments: dict[str, Tensor], names: Collection[str]) -> Built:
    """Candidates of the libraries in `names`, all in memory at once."""
    libraries: Libraries = {
        "torch": ((), lambda: _torch_peers(model, arguments)),
        "OpenVINO": (("openvino", "nncf"), lambda: _openvino_peers(model, arguments)),
        "optimum-quanto": (("optimum", "optimum.quanto"), lambda: _quanto_peers(model, arguments)),
        "torchao": (("torchao",), lambda: _torchao_peers(model, arguments)),
    }
    return _build(libraries, names)


def gpu_peers(model: nn.Module, arguments: dict[str, Tensor], names: Collection[str]) -> Built:
    """The same in bfloat16 on a GPU, where model and arguments are."""
    compiled = torch.compile(model)
    libraries: Libraries = {
        "torch": ((), lambda: {"torch.compile bfloat16": lambda: compiled(**arguments)}),
        "torchao": (("torchao",), lambda: _torchao_peers(model, arguments)),
    }
    return _build(libraries, names)


def _build(libraries: Libraries, names: Collection[str]) -> Built:
    candidates: dict[str, Candidate] = {}
    left_out = {}
    for name in (name for name in libraries if name in names):
        packages, build = libraries[name]
        missing = next((package for package in packages if importlib.util.find_spec(package) is None), None)
        if missing is not None:
            install = "torchao" if name == "torchao" else "'stepquant[bench]'"
            left_out[name] = f"{missing} is not installed (pip install {install})"
            continue
        try:
            candidates |= build()
        except Exception as error:  # of any class: one library's failure must not stop the others
            left_out[name] = first_line(error)
    return candidates, left_out


def _torch_peers(model: nn.Module, arguments: dict[str, Tensor]) -> dict[str, Candidate]:
    half, halved = half_network(model, torch.device("cpu")), half_arguments(arguments, torch.device("cpu"))
    whole_compiled, half_compiled = torch.compile(model), torch.compile(half)
    return {
        "torch.compile float32": lambda: whole_compiled(**arguments),
        "torch eager bfloat16": lambda: half(**halved),
        "torch.compile bfloat16": lambda: half_compiled(**halved),
    }


def _quanto_peers(model: nn.Module, arguments: dict[str, Tensor]) -> dict[str, Candidate]:
    """Weights and activations of convolutions and linear layers."""
    from optimum import quanto

    quantized: Any = copy.deepcopy(model)
    quanto.quantize(quantized, weights=quanto.qint8, activations=quanto.qint8)
    with quanto.Calibration():
        quantized(**arguments)
    quanto.freeze(quantized)
    return {"optimum-quanto int8": lambda: quantized(**arguments)}


def _torchao_peers(model: nn.Module, arguments: dict[str, Tensor]) -> dict[str, Candidate]:
    """Linear layers with dynamic per-row scales; compiled, as its documentation recommends."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized: Any = copy.deepcopy(model)
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(quantized)
    return {"torchao int8 (linear layers), torch.compile": lambda: compiled(**arguments)}


class _Positional(nn.Module):
    """A denoiser with positional arguments that returns a tensor, as converters require."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        result: Tensor = self.model(**dict(zip(self.names, values, strict=True)), return_dict=False)[0]
        return result


def _random(name: str, value: Tensor, step: float) -> Tensor:
    """A random argument like `value`, or the timestep `step`, for calibration."""
    if name == "timestep":
        return torch.full_like(value, step)
    return torch.randn_like(value) if value.is_floating_point() else value


def _openvino_peers(model: nn.Module, arguments: dict[str, Tensor]) -> dict[str, Candidate]:
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    values = tuple(value if value.dim() else value[None] for value in arguments.values())
    inputs = [list(value.shape) for value in values]
    converted = openvino.convert_model(_Positional(model, list(arguments)), example_input=values, input=inputs)
    samples = [
        tuple(_random(name, value, step).numpy() for name, value in zip(arguments, values, strict=True))
        for step in CALIBRATION_STEPS
    ]
    core = openvino.Core()
    inputs_of_step = [value.numpy() for value in values]

    def compiled(network: Any, precision: str) -> Candidate:
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        request = core.compile_model(network, "CPU", options).create_infer_request()
        return lambda: request.infer(inputs_of_step)

    # First the one whose construction takes the most memory; it does not change `converted`.
    quantized = nncf.quantize(
        converted, nncf.Dataset(samples), subset_size=len(samples), preset=nncf.QuantizationPreset.MIXED
    )
    in_int8 = compiled(quantized, "bf16")
    del quantized
    return {
        "OpenVINO float32": compiled(converted, "f32"),
        "OpenVINO bfloat16": compiled(converted, "bf16"),
        "OpenVINO int8 (NNCF)": in_int8,
    }
