"""What a family of the table is: a tiny pipeline and the arguments of its call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PROMPTS = ("a red bicycle", "a")


@dataclass(frozen=True)
class Family:
    """A pipeline of diffusers, built from configuration with random weights.

    Attributes:
        build: builds the pipeline; its argument is an empty folder for files of tokenizers.
        call: further arguments of the pipeline's call, the `inputs` of `stepquant.quantize`: sizes, images, frames.
        steps: number of denoising steps of a call.
        denoisers: names of the components to quantize; the first is what `spec` alone means.
        requires: packages without which diffusers cannot run this pipeline.
    """

    build: Callable[[Path], Any]
    call: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 2
    denoisers: tuple[str, ...] = ("transformer",)
    requires: tuple[str, ...] = ()

    def arguments(self, pipeline: Any, seed: int = 0) -> dict[str, Any]:
        """Return the arguments of a plain call of the pipeline that generates one sample."""
        parameters = inspect.signature(type(pipeline).__call__).parameters
        wanted: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), **self.call}
        if "prompt" in parameters:
            wanted["prompt"] = PROMPTS[0]
        if "class_labels" in parameters:
            wanted["class_labels"] = [1]
        if "num_inference_steps" in parameters:
            wanted["num_inference_steps"] = self.steps
        return wanted

    def prompts(self, pipeline: Any) -> list[str] | None:
        """Return the prompts to calibrate on; None if the pipeline takes none."""
        return list(PROMPTS) if "prompt" in inspect.signature(type(pipeline).__call__).parameters else None
