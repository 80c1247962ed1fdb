"""Report NaN and overflow while images are generated: the layer and the step where they first occur."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepquant.errors import StepquantError
from stepquant.layers.clock import TimestepReader
from stepquant.pipelines.steps import StepCounter


class NotFiniteError(StepquantError):
    """A denoiser outputs NaN or infinity."""


@contextmanager
def watched(
    denoisers: Iterable[nn.Module], on_step: Callable[[], None] | None = None, counter: StepCounter | None = None
) -> Iterator[None]:
    """Check every output of the denoisers for the duration of the context.

    This costs one reduction per call. Only after a fault the call is repeated with a check of every module.

    Args:
        on_step: called after the first call of a denoiser in each step.
        counter: counts the steps of all denoisers together.

    Raises:
        NotFiniteError: at the first output with NaN or infinity, naming the layer and the step where it first occurs.
    """
    counter = counter or StepCounter()
    handles = []
    for denoiser in denoisers:
        watcher = _Watcher(TimestepReader.of(denoiser), counter, on_step)
        handles += [
            denoiser.register_forward_pre_hook(watcher.enter, with_kwargs=True, prepend=True),
            denoiser.register_forward_hook(watcher.leave, with_kwargs=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watcher:
    """The hooks of one denoiser."""

    def __init__(self, timestep_of: TimestepReader, counter: StepCounter, on_step: Callable[[], None] | None) -> None:
        self.timestep_of, self.counter, self.on_step, self.begins = timestep_of, counter, on_step, False

    def enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.begins = self.counter.see(self.timestep_of(args, kwargs))

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.counter.finished = True
        if _fault(output) is not None:
            raise NotFiniteError(
                f"the model fails at step {self.counter.step + 1} of the sampler (timestep {self.counter.time:g}): "
                f"{_origin(module, args, kwargs)}. Check the weights of that layer, or load the model in a wider dtype."
            )
        if self.begins and self.on_step is not None:
            self.on_step()


def _origin(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Describe where the first NaN or infinity of a forward pass comes from."""
    if (fault := _fault((args, kwargs))) is not None:
        return f"its input already contains {fault}"
    found: list[str] = []

    def before(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not found and (fault := _fault((args, kwargs))) is not None:
                found.append(f"the operation before layer {name} outputs {fault}")

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not found and (fault := _fault(output)) is not None:
                largest = max((float(x.abs().max()) for x in _tensors((args, kwargs)) if x.numel()), default=0.0)
                found.append(f"layer {name} outputs {fault} for inputs of up to {largest:.3g}")

        return hook

    handles = []
    for name, module in denoiser.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after(name), with_kwargs=True))
    try:
        with torch.no_grad():
            denoiser.forward(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the last operation of the denoiser outputs a value that is not finite"


def _fault(value: Any) -> str | None:
    """Return ``"NaN"`` or ``"infinity"`` if a tensor anywhere in `value` contains one."""
    for tensor in _tensors(value):
        if not bool(torch.isfinite(tensor).all()):
            return "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
    return None


def _tensors(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in a tree; an output object of diffusers counts as its values."""
    leaves = pytree.tree_leaves(value)
    flat = [part for leaf in leaves for part in (leaf.values() if isinstance(leaf, dict) else [leaf])]
    return [leaf for leaf in flat if isinstance(leaf, Tensor) and leaf.is_floating_point()]
