"""The step clock tells every quantizer of a model which denoising step it is in."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stepquant.errors import StepquantError

CLOSE = 1 / 500
"""Fraction of the calibrated span within which a timestep counts as that of a table row. Samplers that space the same
number of steps differently are a timestep apart, and a table for every training timestep serves fractional ones."""


class StepClock:
    """Maps the timestep of the current forward pass to a row of the activation tables.

    A clock belongs to one model. `attach` hooks the denoiser, so that samplers need no change. A timestep takes the row
    of the nearest calibrated one, so that a sampler may take other steps than calibration did.

    Attributes:
        timesteps: float32 [R], ascending, the timestep of each table row. R = 1 for a model of static tables only.
        time: float32 [] when all samples of the batch have the same timestep, else float32 [B]. Valid during a forward
            pass. Timesteps on an accelerator keep their shape, and uncalibrated ones cause no warning, because reading
            them would wait for the device.
        row: int64, of the same shape and on the same device, the table row of `time`.
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
        self._warned = False
        self._caller: dict[str, int] = {}

    def set(self, timestep: Tensor | float | int) -> None:
        """Set the time, as the denoiser is given it: a number or a tensor [] or [B].

        Of a tensor [B, ...], with a timestep for each token or frame, the latest of each sample counts: those of
        given frames are 0.
        """
        time = torch.as_tensor(timestep).detach().float()
        if time.dim() > 1:
            time = time.flatten(1).amax(dim=1)
        on_cpu = time.device.type == "cpu"
        if on_cpu and time.dim() == 1 and bool((time == time[0]).all()):
            time = time[0]
        if self._boundaries.device != time.device:  # once: a CUDA graph could not hold the copy
            self._boundaries = self._boundaries.to(time.device)
        self.time, self.row = time, torch.bucketize(time, self._boundaries)
        if on_cpu and not self._warned and len(self.timesteps) > 1:
            self._warn_if_uncalibrated(time.reshape(-1))

    def _warn_if_uncalibrated(self, times: Tensor) -> None:
        """Warn once per model about a timestep that is far from every table row."""
        nearest = self.timesteps[self.row.reshape(-1)]
        distance, index = (times - nearest).abs().max(dim=0)
        if float(distance) > CLOSE * float(self.timesteps[-1] - self.timesteps[0]):
            self._warned = True
            warnings.warn(
                f"timestep {float(times[index]):g} was not calibrated; the scales of the nearest calibrated one, "
                f"{float(nearest[index]):g}, are used. Quality is best with the steps that were calibrated.",
                stacklevel=2,
            )

    def attach(self, denoiser: nn.Module, timestep: str | None = None) -> Callable[[], None]:
        """Read the timestep of every call of the denoiser; returns a function that removes the hooks.

        `timestep` names the parameter of the denoiser's forward; None: see `timestep_name`.

        A call raises `StepquantError` while another thread is inside of the denoiser: the clock, and what the kernels
        record, belong to one call at a time. A compiled denoiser does not check this.
        """
        hook = _ClockHook(self, TimestepReader.of(denoiser, timestep))
        before = denoiser.register_forward_pre_hook(hook, with_kwargs=True)
        after = denoiser.register_forward_hook(hook.leave, always_call=True)

        def remove() -> None:
            before.remove()
            after.remove()

        return remove

    def enter(self) -> None:
        """Begin a call in this thread; raises `StepquantError` if another thread is in one."""
        thread = threading.get_ident()
        if self._caller.setdefault("thread", thread) != thread:  # one atomic operation
            raise StepquantError(
                "the quantized denoiser is called from two threads at once; expected one call at a time. Give each "
                "thread its own pipeline, such as copy.deepcopy(pipeline)."
            )

    def leave(self) -> None:
        """End a call of this thread."""
        if self._caller.get("thread") == threading.get_ident():
            del self._caller["thread"]


def of_samples(values: Tensor, batch: int) -> Tensor:
    """Repeat one value per timestep, [B, ...], for a batch of a multiple of B samples: [batch, ...].

    Samples of a timestep are consecutive.

    Raises:
        StepquantError: if `batch` is not a multiple of B.
    """
    if batch % len(values) != 0:
        raise StepquantError(
            f"{len(values)} timesteps were given for a batch of {batch}; expected one for all samples, or one for each."
        )
    return values.repeat_interleave(batch // len(values), dim=0)


TIMESTEP_NAMES = ("timestep", "timesteps", "timestep_ratio", "t", "time", "sigma", "sigmas", "noise_level")
"""Names of the timestep among the parameters of a denoiser's forward, the most specific first."""


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Of the model's forward; a compiled model's own takes anything."""
    return inspect.signature(getattr(model, "_orig_mod", model).forward).parameters


def timestep_name(model: nn.Module) -> str | None:
    """Return the name of the timestep among the parameters of the model's forward; None for one without, such as an
    autoencoder."""
    parameters = _parameters(model)
    return next((name for name in TIMESTEP_NAMES if name in parameters), None)


@dataclass(frozen=True)
class TimestepReader:
    """Finds the timestep among the arguments of a denoiser's call.

    Attributes:
        name: of the parameter.
        position: among the positional arguments.
    """

    name: str
    position: int

    @classmethod
    def of(cls, denoiser: nn.Module, name: str | None = None) -> TimestepReader:
        """Find the parameter `name`, by default the one of `timestep_name`.

        Raises:
            StepquantError: if the denoiser's forward does not have such a parameter.
        """
        names = list(_parameters(denoiser))
        name = name or timestep_name(denoiser)
        if name not in names:
            raise StepquantError(
                f"the forward of {type(denoiser).__name__} has the parameters {', '.join(names)}; expected a timestep "
                f"named {name or ', '.join(TIMESTEP_NAMES[:-1]) + ' or ' + TIMESTEP_NAMES[-1]}. Wrap the model in a "
                "module whose forward has a parameter `timestep`."
            )
        return cls(name, names.index(name))

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return kwargs[self.name] if self.name in kwargs else args[self.position]


class _ClockHook:
    """The hooks of `StepClock.attach`. An object and not closures, so that a deep copy of the model gets its own."""

    def __init__(self, clock: StepClock, timestep_of: TimestepReader) -> None:
        self.clock, self.timestep_of = clock, timestep_of

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self.clock.enter()
        self.clock.set(self.timestep_of(args, kwargs))

    def leave(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.clock.leave()
