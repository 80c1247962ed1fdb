"""Count the steps of a sampler by watching its denoiser."""

from __future__ import annotations

import torch
from torch import Tensor


class StepCounter:
    """Counts the steps of a sampler by changes of the timestep: a step may call the denoiser more than once.

    Attributes:
        step: index of the current step; -1 before the first.
        calls: number of calls of the denoiser in this step so far.
        time: timestep of the current step.
        finished: whether a call has returned, where that is watched.
    """

    def __init__(self) -> None:
        self.step, self.calls, self.time, self.finished = -1, 0, float("nan"), False

    def see(self, timestep: Tensor | float) -> bool:
        """Count a call of the denoiser at `timestep`, a number or a tensor of any shape; returns whether a step begins.

        Of several timesteps the largest counts: image-to-video models give the frames they start from timestep 0.
        """
        time = float(torch.as_tensor(timestep).max())
        begins = time != self.time
        if begins:
            self.step, self.calls, self.time = self.step + 1, 0, time
        self.calls += 1
        return begins
