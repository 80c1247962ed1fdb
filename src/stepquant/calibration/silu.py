"""Which layers read what SiLU puts out: their inputs have a known smallest value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

SILU = (torch.ops.aten.silu.default, torch.ops.aten.silu_.default)


class _Recorder(TorchDispatchMode):
    """Keeps the outputs of SiLU alive, so that no other tensor takes their memory."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in SILU:
            self.outputs.append(output)
        return output


@torch.no_grad()
def layers_behind_silu(model: nn.Module, names: Iterable[str], call: Callable[[], Any]) -> frozenset[str]:
    """The layers of `model` among `names` whose input is SiLU's output, or a view of it, when `call` runs the model."""
    recorder, found = _Recorder(), set()

    def reads(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            memory = inputs[0].untyped_storage().data_ptr()
            if any(memory == output.untyped_storage().data_ptr() for output in recorder.outputs):
                found.add(name)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(reads(name)) for name in names]
    try:
        with recorder:
            call()
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(found)
