"""The step clock: tells every activation quantizer of one model which denoising step it is."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.errors import StepquantError

CLOSE = 1 / 500
"""Of the calibrated span: a timestep this near to a table row counts as that of the row. Samplers that space as many
steps differently are a timestep apart, and a table for every timestep of training serves fractions of one."""


class StepClock:
    """Maps the timestep of the current forward pass to a row of the activation tables.

    One clock belongs to one model. `attach` hooks the denoiser, so that no sampler has to be changed; the mapping is
    to the nearest calibrated timestep, so a sampler may take other steps than calibration did.

    Attributes:
        timesteps: float32 [R], ascending: the timestep of each table row. R = 1 for a model of static tables only.
        time: float32 [] when all samples of the batch share a timestep, else float32 [B]. Valid during a forward pass.
            Where the timestep lies on an accelerator, so do this and `row`: looking at it would wait for the device,
            so there it has the shape it was given in, and no warning of steps that were not calibrated is made.
        row: int64, of the same shape: the table row of `time`.
    """

    def __init__(self, timesteps: Tensor | None = None) -> None:
        grid = torch.zeros(1) if timesteps is None else timesteps.detach().float().cpu()
        if grid.dim() != 1 or grid.numel() == 0 or not bool(torch.isfinite(grid).all()):
            raise ValueError(f"timesteps must be finite and of shape [R], R > 0, not {list(grid.shape)}")
        if bool((grid.diff() <= 0).any()):
            raise ValueError("timesteps must be strictly ascending")
        self.timesteps = grid
        self._boundaries = (grid[1:] + grid[:-1]) / 2
        self.time = grid[0]
        self.row = torch.zeros((), dtype=torch.long)
        self._told = False

    def set(self, timestep: Tensor | float | int) -> None:
        """Set the time: a number or a tensor [] or [B], in the units of the scheduler's timesteps."""
        time = torch.as_tensor(timestep).detach().float()
        here = time.device.type == "cpu"
        if here and time.dim() == 1 and bool((time == time[0]).all()):
            time = time[0]
        if self._boundaries.device != time.device:  # once: a CUDA graph could not hold the copy
            self._boundaries = self._boundaries.to(time.device)
        self.time, self.row = time, torch.bucketize(time, self._boundaries)
        if here and not self._told and len(self.timesteps) > 1:
            self._tell(time.reshape(-1))

    def _tell(self, times: Tensor) -> None:
        """Warn, once a model, that a sampler takes steps that no table row was made for."""
        nearest = self.timesteps[self.row.reshape(-1)]
        distance, index = (times - nearest).abs().max(dim=0)
        if float(distance) > CLOSE * float(self.timesteps[-1] - self.timesteps[0]):
            self._told = True
            warnings.warn(
                f"timestep {float(times[index]):g} was not calibrated: it takes the scales of the nearest that was, "
                f"{float(nearest[index]):g}. Quality is best with the sampler's steps that calibration had.",
                stacklevel=2,
            )

    def attach(self, denoiser: nn.Module) -> torch.utils.hooks.RemovableHandle:
        """Read `timestep` from every call of the denoiser's forward; returns the handle that removes the hook."""
        position = list(inspect.signature(denoiser.forward).parameters).index("timestep")
        return denoiser.register_forward_pre_hook(_ReadTimestep(self, position), with_kwargs=True)


def of_samples(values: Tensor, batch: int) -> Tensor:
    """What each of the clock's steps has, [B, ...], for a batch of a multiple of B samples, [batch, ...]: samples of a
    step stay together.

    Raises:
        StepquantError: if `batch` is no multiple of B.
    """
    if batch % len(values) != 0:
        raise StepquantError(
            f"{len(values)} timesteps were given for a batch of {batch}: expected one for all samples, or one for each."
        )
    return values.repeat_interleave(batch // len(values), dim=0)


def reads_timestep(model: nn.Module) -> bool:
    """Whether a model's forward takes a `timestep`: a denoiser does, an autoencoder does not."""
    return "timestep" in inspect.signature(model.forward).parameters


class _ReadTimestep:
    """The hook. An object and not a closure, so that a deep copy of the model gets a hook on the copy's clock."""

    def __init__(self, clock: StepClock, position: int) -> None:
        self.clock, self.position = clock, position

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.clock.set(kwargs["timestep"] if "timestep" in kwargs else args[self.position])
