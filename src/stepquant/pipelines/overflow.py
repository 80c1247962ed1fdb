"""Notice NaN and overflow while images are drawn, and say in which layer and at which step they began."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepquant.errors import StepquantError


@contextmanager
def watched(denoiser: nn.Module) -> Iterator[None]:
    """Look at every output of the denoiser while the context lasts.

    The pass is repeated with a look at every module only once something is wrong: until then it costs one reduction.

    Raises:
        StepquantError: at the first output with NaN or infinity, naming the layer and the step where it began.
    """
    step, moment = -1, float("nan")

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal step, moment
        time = float(torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).reshape(-1)[0])
        if time != moment:
            step, moment = step + 1, time
        if _fault(output) is not None:
            raise StepquantError(
                f"the model fails at step {step + 1} of the sampler (timestep {time:g}): "
                f"{_origin(module, args, kwargs)}; check that layer's weights, or load the model in a wider type."
            )

    handle = denoiser.register_forward_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _origin(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Where the first NaN or infinity of a forward pass comes from, in words."""
    if (fault := _fault((args, kwargs))) is not None:
        return f"{fault} already reaches it as input"
    found: list[str] = []

    def before(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not found and (fault := _fault((args, kwargs))) is not None:
                found.append(f"{fault} reaches layer {name} from the operation before it")

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not found and (fault := _fault(output)) is not None:
                largest = max((float(x.abs().max()) for x in _tensors((args, kwargs)) if x.numel()), default=0.0)
                found.append(f"layer {name} puts out {fault} from inputs of up to {largest:.3g}")

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
    return found[0] if found else "its last operation puts out no finite number"


def _fault(value: Any) -> str | None:
    """``"NaN"`` or ``"infinity"`` if a tensor anywhere in `value` holds one."""
    for tensor in _tensors(value):
        if not bool(torch.isfinite(tensor).all()):
            return "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
    return None


def _tensors(value: Any) -> list[Tensor]:
    """The floating tensors in a tree; an output object of diffusers counts as its values."""
    leaves = pytree.tree_leaves(value)
    flat = [part for leaf in leaves for part in (leaf.values() if isinstance(leaf, dict) else [leaf])]
    return [leaf for leaf in flat if isinstance(leaf, Tensor) and leaf.is_floating_point()]
