"""Time of a step by part in the native runtime, and the share of the machine's int8 peak that its products reach."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from stepquant.bench.measure import wall_seconds
from stepquant.core.qtensor import GridFormat
from stepquant.errors import StepquantError
from stepquant.layers.clock import StepClock
from stepquant.layers.conv import QuantizedConv
from stepquant.layers.format import LayerFormat
from stepquant.layers.linear import QuantizedLinear
from stepquant.layers.quantized import quantized_modules
from stepquant.runtime.native import NativeKernel
from stepquant.runtime.native.attention import NativeAttention
from stepquant.runtime.native.replay import step_by_step

PEAK_ROWS, PEAK_INPUTS, PEAK_OUTPUTS = 4096, 2880, 320
"""Shape of the product that measures the peak: its weights fit the second-level cache, and it stores little."""


class Share(BaseModel):
    """Part of a step.

    Attributes:
        seconds, share_of_time: duration within one step, and relative to the step.
        operations: integer multiplications and additions.
        share_of_peak: operations per second, relative to the measured peak.
    """

    part: str
    seconds: float
    share_of_time: float
    operations: int = 0
    share_of_peak: float = 0.0


class _Timed:
    """The native library with timed functions."""

    def __init__(self, library: Any, record: Callable[[str, float], None], product: str) -> None:
        self.library, self.record = library, record
        self.names = {"sq_layer": product, "sq_codes": "normalize, SiLU, quantize", "sq_attention": "attention"}

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.library, name)

        def timed(*arguments: Any) -> None:
            start = time.perf_counter()
            function(*arguments)
            self.record(self.names[name], time.perf_counter() - start)

        return timed


@torch.no_grad()
def measure_roofline(model: nn.Module, arguments: dict[str, Tensor], rounds: int = 5) -> tuple[float, list[Share]]:
    """The measured int8 peak in operations per second, and the parts of a step of a model with native kernels.

    Kernels are timed one by one, the whole step by its recordings; the difference is the last part.

    Raises:
        StepquantError: if no layer of the model has a native kernel.
    """
    layers = {name: layer for name, layer in quantized_modules(model).items() if isinstance(layer.kernel, NativeKernel)}
    if not layers:
        raise StepquantError("`roofline` needs native kernels, and this machine runs none. Leave it out.")
    peak = _int8_peak(rounds)
    seconds: dict[str, float] = defaultdict(float)
    operations: dict[str, int] = defaultdict(int)

    def record(part: str, duration: float) -> None:
        seconds[part] += duration

    whole = _median_seconds(lambda: model(**arguments), rounds)
    restore = []
    for layer in layers.values():
        part = "convolutions" if isinstance(layer, QuantizedConv) else "linear layers"
        kernel: Any = layer.kernel
        restore.append((kernel, kernel.library, kernel.run))
        kernel.library = _Timed(kernel.library, record, part)
        kernel.run = _counting(kernel.run, operations, part, layer.weight_shape)
    for module in model.modules():
        if isinstance(module, NativeAttention):
            restore.append((module, module.library, None))
            timed: Any = _Timed(module.library, record, "attention")
            module.library = timed
    try:
        with step_by_step():
            model(**arguments)
            seconds.clear()
            operations.clear()
            for _ in range(rounds):
                model(**arguments)
    finally:
        for kernel, library, run in restore:
            kernel.library = library
            if run is not None:
                del kernel.run
    parts = {name: value / rounds for name, value in seconds.items()}
    parts["rest (Python, normalization statistics, float layers)"] = whole - sum(parts.values())
    counts = {name: count // rounds for name, count in operations.items()}
    return peak, [
        Share(
            part=name,
            seconds=value,
            share_of_time=value / whole,
            operations=counts.get(name, 0),
            share_of_peak=counts.get(name, 0) / value / peak,
        )
        for name, value in sorted(parts.items(), key=lambda pair: -pair[1])
    ]


def _median_seconds(run: Callable[[], object], rounds: int) -> float:
    for _ in range(2):  # the second run of a block is recorded
        run()
    return median(wall_seconds(run) for _ in range(rounds))


def _counting(
    run: Callable[..., Tensor], operations: dict[str, int], part: str, weight_shape: tuple[int, ...]
) -> Callable[..., Tensor]:
    def counted(*arguments: Any, **more: Any) -> Tensor:
        y = run(*arguments, **more)
        inputs = torch.Size(weight_shape[1:]).numel()
        operations[part] += 2 * y.numel() * inputs
        return y

    return counted


def _int8_peak(rounds: int) -> float:
    """Operations per second of one large linear layer in the native runtime."""
    layer_format = LayerFormat(weight=GridFormat(bits=8), input=GridFormat(bits=8))
    layer = QuantizedLinear(PEAK_INPUTS, PEAK_OUTPUTS, False, layer_format, StepClock())
    layer.weight_zero_point.fill_(128)
    kernel: Any = NativeKernel(layer)
    x, row, durations = torch.randn(PEAK_ROWS, PEAK_INPUTS), torch.tensor(0), []

    def record(part: str, duration: float) -> None:
        if part == "product":
            durations.append(duration)

    kernel.library = _Timed(kernel.library, record, "product")
    for _ in range(rounds):
        kernel(x, row)
    return 2 * PEAK_ROWS * PEAK_INPUTS * PEAK_OUTPUTS / min(durations)
