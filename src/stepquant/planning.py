"""What a quantization will take, told before it starts and measured on a call of the denoiser."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import nn

from stepquant.calibration.samples import Calibration
from stepquant.memory import peak_resident_bytes, resident_bytes
from stepquant.models import denoiser_name, describe
from stepquant.pipelines.generate import Request, generate

Effort = Literal["quick", "standard", "thorough"]


class Preset(NamedTuple):
    """Calibration samples, denoising steps they come from, and iterations a block of recipes that learn."""

    samples: int
    steps: int
    iterations: int


EFFORTS: dict[str, Preset] = {
    "quick": Preset(64, 20, 50),
    "standard": Preset(256, 50, 500),
    "thorough": Preset(1024, 100, 2000),
}

LEARNING = 3
"""Forward passes that an iteration costs: its own, and a backward pass worth two."""
PASSES = 4
"""Times that the samples pass the model besides: targets, inputs, ranges and the quantized outputs of each block."""
QUANTIZED = 1.8
"""Memory beyond the loaded pipeline, in units of the denoiser's weights: codes, kernels, samples, work on a block."""


@dataclass(frozen=True)
class Plan:
    """Stages and what they take; ``str`` is what the command prints.

    Attributes:
        blocks: units of reconstruction of the denoiser.
        parameters: of the denoiser.
        images, steps, samples: drawn for calibration, denoising steps of each, and inputs kept of them.
        iterations: a block; 0 for a recipe that learns nothing.
        seconds: estimated, the collection of samples and all the rest.
        memory: estimated peak, bytes.
    """

    family: str
    blocks: int
    parameters: int
    images: int
    steps: int
    samples: int
    iterations: int
    seconds: tuple[float, float]
    memory: int

    def __str__(self) -> str:
        learning = f"{self.iterations} iterations each" if self.iterations else "nothing is learned"
        collecting, calibrating = (duration(seconds) for seconds in self.seconds)
        return (
            f"plan: {self.family}, {self.parameters / 1e6:.1f} M parameters; "
            f"{self.samples} samples from {self.images} images of {self.steps} steps (about {collecting}), "
            f"then {self.blocks} blocks, {learning} (about {calibrating}); about {self.memory / 1e9:.1f} GB of memory"
        )


def make_plan(pipeline: Any, request: Request, calibration: Calibration, hyperparameters: dict[str, Any]) -> Plan:
    """Time one call of the denoiser on one image, and multiply.

    Args:
        hyperparameters: of the recipe; ``iterations`` and ``batch_size`` count if it has them.
    """
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    description = describe(denoiser)
    call = _seconds_of_a_call(pipeline, denoiser, request)
    iterations = int(hyperparameters.get("iterations", 0))
    batch = min(int(hyperparameters.get("batch_size", 16)), calibration.samples)
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    return Plan(
        family=description.family,
        blocks=len(description.blocks),
        parameters=parameters,
        images=calibration.images,
        steps=calibration.steps,
        samples=calibration.samples,
        iterations=iterations,
        seconds=(
            call * calibration.images * calibration.steps,
            call * (PASSES * calibration.samples + LEARNING * iterations * batch),
        ),
        memory=max(peak_resident_bytes(), resident_bytes() + int(QUANTIZED * 4 * parameters)),
    )


def _seconds_of_a_call(pipeline: Any, denoiser: nn.Module, request: Request) -> float:
    """The shorter of two steps of one image: the first is slowed by what is set up once."""
    started: list[float] = []
    spent: list[float] = []
    before = denoiser.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))
    after = denoiser.register_forward_hook(lambda *_: spent.append(time.perf_counter() - started[-1]))
    try:
        generate(
            pipeline,
            Request(request.conditions, 2, request.guidance, request.size, request.inputs),
            [0],
            0,
            decode=False,
        )
    finally:
        before.remove()
        after.remove()
    return min(spent)


def duration(seconds: float) -> str:
    """Seconds for people, in the unit that fits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
