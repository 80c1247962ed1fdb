"""Fidelity of a quantized pipeline to its full-precision source: of images, and of each denoising step."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.errors import StepquantError
from stepquant.layers.clock import TimestepReader
from stepquant.pipelines.arguments import renewed

PEAK_TO_PEAK = 2.0
"""Range of images in [-1, 1]."""
HIGHEST_PSNR = 100.0
"""Cap of PSNR in dB, so that the mean stays finite with identical images."""


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image or video, dB, float64 [N]; at most `HIGHEST_PSNR`.

    ``10 log10(4 / mean((x - y)^2))`` of float [N, C, H, W] or [N, C, F, H, W] in [-1, 1], over all values.

    The mean of decibels is not the decibels of the mean. A shift by one pixel costs more than a lost texture. Between
    models, PSNR only compares how far each moved from its own source.

    Raises:
        StepquantError: if the shapes differ.
    """
    check_pairs(images, reference)
    error = (images.double() - reference.double()).square().flatten(1).mean(dim=1)
    return (10 * torch.log10(PEAK_TO_PEAK**2 / error)).clamp(max=HIGHEST_PSNR)


def snr(audio: Tensor, reference: Tensor) -> Tensor:
    """Signal-to-noise ratio of each sound, ``10 log10(sum(y^2) / sum((x - y)^2))`` in dB, float64 [N].

    At most `HIGHEST_PSNR`. For audio float [N, C, L] of any scale.

    Raises:
        StepquantError: if the shapes differ.
    """
    check_pairs(audio, reference)
    signal = reference.double().square().flatten(1).sum(dim=1)
    error = (audio.double() - reference.double()).square().flatten(1).sum(dim=1)
    return (10 * torch.log10(signal / error)).clamp(max=HIGHEST_PSNR)


def check_pairs(samples: Tensor, reference: Tensor) -> None:
    """Raise `StepquantError` unless both hold images, video or audio of the same shape."""
    if samples.shape != reference.shape or samples.dim() not in (3, 4, 5):
        shapes = f"{list(samples.shape)} and {list(reference.shape)}"
        raise StepquantError(
            f"images of {shapes} cannot be compared; expected the same [N, C, H, W], [N, C, F, H, W] of video, or "
            "[N, C, L] of audio."
        )


@dataclass
class Shadow:
    """Runs the quantized denoiser on every input of the full-precision one while the latter generates images.

    The trajectory stays the full-precision one. Since the two alternate, other load on the machine slows both equally,
    and the ratio of their times stays meaningful.

    Use as a context manager around each batch. A step is a sequence of calls with the same timestep.
    """

    reference: nn.Module
    quantized: nn.Module
    _error: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    _norm: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    _seconds: dict[int, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    @property
    def step_error(self) -> list[float]:
        """Relative L2 error of the output at each step: ``|q(x_t) - f(x_t)| / |f(x_t)|`` over all images."""
        return [(self._error[step] / self._norm[step]) ** 0.5 if self._norm[step] else 0.0 for step in self._error]

    @property
    def seconds(self) -> tuple[float, float]:
        """Median seconds of one step of the largest batch: full precision, quantized."""
        reference, quantized = zip(*self._seconds[max(self._seconds)], strict=True)
        return median(reference), median(quantized)

    def __enter__(self) -> Shadow:
        self._step, self._timestep = -1, math.nan
        before = self.reference.register_forward_pre_hook(self._start, with_kwargs=True)
        after = self.reference.register_forward_hook(self._compare, with_kwargs=True)
        self._hooks = (before, after)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _start(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._arguments = renewed((args, kwargs))
        self._started = time.perf_counter()

    def _compare(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        finished = time.perf_counter()
        args, kwargs = self._arguments
        quantized = _sample(self.quantized(*args, **kwargs))
        seconds = (finished - self._started, time.perf_counter() - finished)

        reference = _sample(output)
        timestep = float(torch.as_tensor(TimestepReader.of(self.reference)(args, kwargs)).max())
        if timestep != self._timestep:
            self._step, self._timestep = self._step + 1, timestep
            self._times = self._seconds[reference.shape[0]]  # further calls of a step may have another batch size
            self._times.append((0.0, 0.0))
        self._times[-1] = (self._times[-1][0] + seconds[0], self._times[-1][1] + seconds[1])
        self._error[self._step] += float((quantized.double() - reference.double()).square().sum())
        self._norm[self._step] += float(reference.double().square().sum())


def _sample(output: Any) -> Tensor:
    """The tensor in a denoiser's output, an output object or a tuple; a list of one tensor per sample is stacked."""
    first = output if isinstance(output, Tensor) else output[0]
    return torch.stack(first) if isinstance(first, list) else first
