"""Samples that nothing was fitted to, in full precision, and how near a quantized denoiser comes to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stepquant.assembly import pipeline_with
from stepquant.calibration.samples import CalibrationSet
from stepquant.models.description import main_tensor
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import Request
from stepquant.quality.fidelity import HIGHEST_PSNR, Shadow, psnr, snr

SEED_OFFSET = 2_000_250_000
"""Added to the seed of held-out images: a quarter of a million from the noise of every calibration image
(`NOISE_OFFSET`, `TRAJECTORIES_OFFSET`, `CORRECTION_OFFSET`), and far behind that of evaluated ones; modulo 2^32."""
IMAGES = 4
"""Samples of a check."""
CALLS = 3
"""Calls of a denoiser that a check takes per sample and step: one in full precision, two of the quantized one."""
LOWEST = -100.0
"""Decibels of samples that are not finite."""


class HeldOut(Protocol):
    """Full-precision samples to compare with."""

    @property
    def count(self) -> int:
        """Number of samples."""
        ...

    @property
    def steps(self) -> int:
        """Steps that the samples take."""
        ...

    def decibels(self, quantized: Mapping[str, nn.Module]) -> Tensor:
        """Fidelity of each sample with these denoisers, by name, in place of the full-precision ones: dB, [N]."""
        ...


@dataclass(frozen=True)
class HeldOutImages:
    """Images, video or audio from noise, and where there are enough from prompts, that no calibration uses.

    Attributes:
        pipeline: in full precision.
        request: its steps are those of the calibration, or fewer.
        first: index of the first sample, behind those of the calibration: selects noise and condition.
        reference: full-precision samples, float32 [N, ...].
        step_error: component -> relative L2 error of its output at each step along the full-precision trajectory.
    """

    pipeline: Any
    request: Request
    first: int
    seed: int
    reference: Tensor
    step_error: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def generate(
        cls,
        pipeline: Any,
        request: Request,
        first: int,
        count: int,
        seed: int,
        *,
        compared: Mapping[str, nn.Module] | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> HeldOutImages:
        """Generate the samples in full precision.

        Args:
            compared: quantized denoisers whose `step_error` is measured.
        """
        shadows = {name: Shadow(getattr(pipeline, name), model) for name, model in (compared or {}).items()}
        with ExitStack() as stack:
            for shadow in shadows.values():
                stack.enter_context(shadow)
            indices = range(first, first + count)
            reference = generate(pipeline, request, indices, seed + SEED_OFFSET, on_step=on_step)
        errors = {name: shadow.step_error for name, shadow in shadows.items()}
        return cls(pipeline, request, first, seed, reference, errors)

    @property
    def count(self) -> int:
        return len(self.reference)

    @property
    def steps(self) -> int:
        return self.request.steps

    def decibels(self, quantized: Mapping[str, nn.Module], on_step: Callable[[], None] | None = None) -> Tensor:
        """See `HeldOut.decibels`: PSNR of images and video, signal-to-noise ratio of anything else."""
        pipeline = pipeline_with(self.pipeline, quantized)
        indices = range(self.first, self.first + self.count)
        samples = generate(pipeline, self.request, indices, self.seed + SEED_OFFSET, on_step=on_step)
        return decibels_of(samples, self.reference)

    def shortened(self, count: int, steps: int) -> HeldOutImages:
        """Fewer images of fewer steps, generated again."""
        request = replace(self.request, steps=min(steps, self.steps))
        return HeldOutImages.generate(self.pipeline, request, self.first, min(count, self.count), self.seed)


@dataclass(frozen=True)
class HeldOutCalls:
    """Recorded calls of a denoiser without a pipeline that no calibration uses.

    Attributes:
        reference: the full-precision outputs, float32 [N, ...].
    """

    samples: CalibrationSet
    reference: Tensor

    @classmethod
    def of(cls, model: nn.Module, samples: CalibrationSet) -> HeldOutCalls:
        return cls(samples, _outputs(model, samples))

    @property
    def count(self) -> int:
        return len(self.samples)

    @property
    def steps(self) -> int:
        return int(self.samples.steps.max()) + 1

    def decibels(self, quantized: Mapping[str, nn.Module]) -> Tensor:
        """See `HeldOut.decibels`: signal-to-noise ratio of the denoiser's output."""
        (model,) = quantized.values()
        return decibels_of(_outputs(model, self.samples).unsqueeze(1), self.reference.unsqueeze(1), images=False)


@torch.no_grad()
def _outputs(model: nn.Module, samples: CalibrationSet) -> Tensor:
    """float32 [N, values] of every sample; padded with zeros where samples differ in size."""
    outputs = [main_tensor(model(**samples.arguments(rows))) for rows in samples.batches(1)]
    return torch.nn.utils.rnn.pad_sequence([output.float().flatten().cpu() for output in outputs], batch_first=True)


def decibels_of(samples: Tensor, reference: Tensor, *, images: bool = True) -> Tensor:
    """PSNR of images or video, signal-to-noise ratio of other samples; `LOWEST` where they are not finite: [N]."""
    if images and reference.dim() in (4, 5):
        return psnr(samples, reference).nan_to_num(LOWEST, HIGHEST_PSNR, LOWEST).clamp(min=LOWEST)
    flat = [values.flatten(1).unsqueeze(1) for values in (samples, reference)]
    return snr(*flat).nan_to_num(LOWEST, HIGHEST_PSNR, LOWEST).clamp(min=LOWEST)
