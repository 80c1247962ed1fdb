"""What else runs the same network: torch as it is and compiled, OpenVINO in float, bfloat16 and its own int8, and
other libraries' int8 of torch modules."""

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

Contestant = Callable[[], object]
Libraries = dict[str, tuple[tuple[str, ...], Callable[[], dict[str, Contestant]]]]
"""Name -> the packages it needs, and what builds its contestants."""
PEERS = ("torch", "OpenVINO", "optimum-quanto", "torchao")
CALIBRATION_STEPS = (10.0, 500.0, 900.0)


def check_peers(names: Collection[str]) -> tuple[str, ...]:
    """The names as `PEERS` has them; raises `StepquantError` for one that is not there."""
    known = {name.lower(): name for name in PEERS}
    unknown = next((name for name in names if name.lower() not in known), None)
    if unknown is not None:
        raise StepquantError(f"there is no peer {unknown!r}: expected one of {', '.join(PEERS)}.")
    return tuple(known[name.lower()] for name in names)


def peers(
    model: nn.Module, arguments: dict[str, Tensor], threads: int, names: Collection[str]
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Name -> one step, ready to run; and name -> why not, of those that cannot run here.

    Args:
        names: the libraries to take, of `PEERS`. Their networks are all in memory at a time.
    """
    libraries: Libraries = {
        "torch": ((), lambda: _torch_peers(model, arguments)),
        "OpenVINO": (("openvino", "nncf"), lambda: _openvino_peers(model, arguments, threads)),
        "optimum-quanto": (("optimum", "optimum.quanto"), lambda: _quanto_peers(model, arguments)),
        "torchao": (("torchao",), lambda: _torchao_peers(model, arguments)),
    }
    return _built(libraries, names)


def gpu_peers(
    model: nn.Module, arguments: dict[str, Tensor], names: Collection[str]
) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The same on a GPU, where model and arguments are, in bfloat16."""
    compiled = torch.compile(model)
    libraries: Libraries = {
        "torch": ((), lambda: {"torch.compile bfloat16": lambda: compiled(**arguments)}),
        "torchao": (("torchao",), lambda: _torchao_peers(model, arguments)),
    }
    return _built(libraries, names)


def _built(libraries: Libraries, names: Collection[str]) -> tuple[dict[str, Contestant], dict[str, str]]:
    found: dict[str, Contestant] = {}
    left_out = {}
    for name, (packages, build) in libraries.items():
        if name not in names:
            continue
        missing = next((package for package in packages if importlib.util.find_spec(package) is None), None)
        if missing is not None:
            install = "torchao" if name == "torchao" else "'stepquant[bench]'"
            left_out[name] = f"{missing} is not installed (pip install {install})"
            continue
        try:
            found |= build()
        except Exception as error:  # another library's, of many classes: it is no reason not to time the others
            left_out[name] = first_line(error)
    return found, left_out


def _torch_peers(model: nn.Module, arguments: dict[str, Tensor]) -> dict[str, Contestant]:
    half, halved = half_network(model, torch.device("cpu")), half_arguments(arguments, torch.device("cpu"))
    whole_compiled, half_compiled = torch.compile(model), torch.compile(half)
    return {
        "torch.compile float32": lambda: whole_compiled(**arguments),
        "torch eager bfloat16": lambda: half(**halved),
        "torch.compile bfloat16": lambda: half_compiled(**halved),
    }


def _quanto_peers(model: nn.Module, arguments: dict[str, Tensor]) -> dict[str, Contestant]:
    """Convolutions and linears, weights and activations."""
    from optimum import quanto

    quantized: Any = copy.deepcopy(model)
    quanto.quantize(quantized, weights=quanto.qint8, activations=quanto.qint8)
    with quanto.Calibration():
        quantized(**arguments)
    quanto.freeze(quantized)
    return {"optimum-quanto int8": lambda: quantized(**arguments)}


def _torchao_peers(model: nn.Module, arguments: dict[str, Tensor]) -> dict[str, Contestant]:
    """Linears, with a scale found for each row as it comes; compiled, as its documentation advises."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized: Any = copy.deepcopy(model)
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    compiled = torch.compile(quantized)
    return {"torchao int8 (linears), torch.compile": lambda: compiled(**arguments)}


class _Positional(nn.Module):
    """A denoiser that takes its arguments in order and returns a tensor, as converters want it."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        result: Tensor = self.model(**dict(zip(self.names, values, strict=True)), return_dict=False)[0]
        return result


def _random(name: str, value: Tensor, step: float) -> Tensor:
    """An argument like `value` at another step, for calibration."""
    if name == "timestep":
        return torch.full_like(value, step)
    return torch.randn_like(value) if value.is_floating_point() else value


def _openvino_peers(model: nn.Module, arguments: dict[str, Tensor], threads: int) -> dict[str, Contestant]:
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
    given = [value.numpy() for value in values]

    def compiled(network: Any, precision: str) -> Contestant:
        options = {
            "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
        }  # fmt: skip
        request = core.compile_model(network, "CPU", options).create_infer_request()
        return lambda: request.infer(given)

    # First what takes the most memory on the way; it leaves the network that it is given as it is.
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
