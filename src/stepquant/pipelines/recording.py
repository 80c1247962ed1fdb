"""Record the calls that a model of a pipeline really gets, with any structure of arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepquant.errors import StepquantError
from stepquant.layers.clock import timestep_name
from stepquant.pipelines.arguments import named_arguments
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import Request
from stepquant.pipelines.steps import StepCounter


@dataclass(frozen=True)
class RecordedCall:
    """One call of a module, with copies of its tensors.

    Attributes:
        arguments: by name; any values and trees of them (tensors, numbers, None, tuples, lists, dictionaries). Those
            that were left out are absent, and ``module(**arguments)`` repeats the call.
        output: what the module returned.
        step: which of the module's steps the call belongs to, from 0; a step may have several calls, such as the two
            halves of guidance.
    """

    arguments: dict[str, Any]
    output: Any
    step: int


def record_calls(
    pipeline: Any, component: str, request: Request, indices: Sequence[int], seed: int, steps: int | None = 1
) -> list[RecordedCall]:
    """Generate images and return the first calls that a component gets, in order; generation then ends.

    Args:
        component: name of a module of the pipeline with a timestep, such as ``"transformer"``.
        indices: images to generate, in one batch; an index may occur more than once.
        steps: number of the component's steps whose calls are recorded; None for all.

    Raises:
        StepquantError: if the pipeline does not call the component, or as `generate`.
    """
    module: nn.Module = getattr(pipeline, component)
    calls: list[RecordedCall] = []
    counter, timestep = StepCounter(), timestep_name(module)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = named_arguments(module, args, kwargs).get(timestep or "")
        if time is not None:
            counter.see(time)
        if steps is not None and counter.step >= steps:
            raise _EnoughRecorded

    def receive(arguments: dict[str, Any], output: Any) -> None:
        calls.append(RecordedCall(_copied(arguments), _copied(output), max(0, counter.step)))

    removals = [module.register_forward_pre_hook(before, with_kwargs=True).remove, on_call(module, receive)]
    try:
        generate(pipeline, request, indices, seed, decode=False)
    except _EnoughRecorded:
        if hasattr(pipeline, "maybe_free_model_hooks"):  # what the pipeline would do after its last step
            pipeline.maybe_free_model_hooks()
    finally:
        for remove in removals:
            remove()
    if not calls:
        raise StepquantError(
            f"{type(pipeline).__name__} does not call its {component} with these inputs; expected at least one call. "
            "Leave it out."
        )
    return calls


def on_call(module: nn.Module, receive: Callable[[dict[str, Any], Any], None]) -> Callable[[], None]:
    """Call ``receive(arguments, output)`` after every call of `module`; returns a function that ends this."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        receive(named_arguments(module, args, kwargs), output)

    return module.register_forward_hook(hook, with_kwargs=True).remove


class _EnoughRecorded(Exception):
    """Ends generation, of which no more is needed."""


def _copied(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, pytree.tree_map_only(Tensor, torch.detach, tree))
