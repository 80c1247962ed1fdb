"""Correction of the quantization error that is correlated with the denoiser's output (PTQD, arXiv 2305.10657)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.errors import StepquantError
from stepquant.layers.clock import StepClock


@dataclass(frozen=True)
class Correction:
    """Model of the quantization error of the output at each step: ``eps~ = (1 + k) eps + residual``.

    Attributes:
        timesteps: float32 [K], ascending: the steps it was estimated at; others take the nearest one's.
        gain: float32 [K], positive: 1 / (1 + k), which the output is multiplied by.
        variance: float32 [K], not negative: of one element of the residual that is left after that.
    """

    timesteps: Tensor
    gain: Tensor
    variance: Tensor

    def check(self) -> None:
        """Raise `StepquantError` unless the invariants above hold."""
        values = (self.timesteps, self.gain, self.variance)
        whole = all(bool(torch.isfinite(value).all()) and value.shape == self.timesteps.shape for value in values)
        if not whole or bool((self.timesteps.diff() <= 0).any()) or bool((self.gain <= 0).any()):
            raise StepquantError("the output's correction is damaged: quantize the model again.")
        if bool((self.variance < 0).any()):
            raise StepquantError("the output's correction has a negative variance: it is damaged, quantize again.")


class OutputCorrection(nn.Module):
    """Correction as a submodule of the denoiser, with its table as buffers, applied by a forward hook.

    Args:
        rows: number of timesteps, K.
    """

    timesteps: Tensor
    gain: Tensor
    variance: Tensor

    def __init__(self, rows: int, clock: StepClock) -> None:
        super().__init__()
        self.clock = clock
        for name in ("timesteps", "gain", "variance"):
            self.register_buffer(name, torch.zeros(rows, dtype=torch.float32))

    def fill(self, correction: Correction) -> None:
        """Copy a table with this module's rows."""
        for name in ("timesteps", "gain", "variance"):
            setattr(self, name, getattr(correction, name).clone())

    def correction(self) -> Correction:
        """The table, checked; raises `StepquantError` on damage."""
        correction = Correction(self.timesteps, self.gain, self.variance)
        correction.check()
        return correction

    def at(self, values: Tensor, time: Tensor) -> Tensor:
        """The value of a table at the nearest of its timesteps: float32, of the shape of `time`."""
        timesteps, values = (table.float().to(time.device) for table in (self.timesteps, values))
        nearest = torch.bucketize(time, (timesteps[1:] + timesteps[:-1]) / 2)
        return values.index_select(0, nearest.reshape(-1)).reshape(time.shape)

    def forward(self, output: Tensor, channels: int) -> Tensor:
        """output: float [B, C, ...] -> the same, its first `channels` multiplied by the gain of the step."""
        gain = self.at(self.gain, self.clock.time).to(output.device, output.dtype)
        if gain.dim() == 1:
            gain = gain.reshape(-1, *(1,) * (output.dim() - 1))
        if output.shape[1] == channels:
            return output * gain
        return torch.cat([output[:, :channels] * gain, output[:, channels:]], dim=1)

    def attach(self, denoiser: nn.Module) -> None:
        """Add this module to `denoiser` and correct its output."""
        denoiser.add_module(PART, self)
        denoiser.register_forward_hook(_correct)


PART = "output_correction"
"""Name of the submodule in the denoiser."""


def correction_of(denoiser: nn.Module) -> OutputCorrection | None:
    """The correction of a denoiser, if it has one."""
    found = getattr(denoiser, PART, None)
    return found if isinstance(found, OutputCorrection) else None


def _correct(denoiser: nn.Module, _inputs: Any, output: Any) -> Any:
    """Forward hook; takes the correction from the denoiser it runs on, so that it works on copies."""
    correct = getattr(denoiser, PART)
    whole = output[0]
    corrected = correct(whole, predicted_channels(denoiser, whole))
    if isinstance(output, tuple):
        return (corrected, *output[1:])
    output.sample = corrected
    return output


def predicted_channels(denoiser: nn.Module, output: Tensor) -> int:
    """How many channels of the output, float [B, C, ...], are the prediction: the rest are variances, as many again."""
    inputs = denoiser.config.get("in_channels", 0)  # type: ignore[operator, union-attr]
    return inputs if output.dim() > 3 and output.shape[1] == 2 * inputs else output.shape[1]
