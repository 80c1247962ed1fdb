"""Record the calls that a model of a pipeline really gets, with any structure of arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from stepquant.errors import StepquantError
from stepquant.layers.clock import TimestepReader, timestep_name
from stepquant.layers.forwards import replaced_forwards
from stepquant.layers.quantized import can_quantize
from stepquant.models.denoisers import denoisers
from stepquant.pipelines.arguments import named_arguments, plain_output, renewed
from stepquant.pipelines.call import takes_batches
from stepquant.pipelines.doubling import doubled_call
from stepquant.pipelines.generate import RejectedError, generate
from stepquant.pipelines.layout import Entries, Layout, Part, Rows, UnknownLayoutError, divided, find_layout, samples_in
from stepquant.pipelines.request import Request
from stepquant.pipelines.steps import StepCounter

OUTPUT = "-> output"
"""Name of the output among the recorded arguments of a call; not a valid argument name."""


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
        generate(pipeline, request, indices, seed, decode=False, split=False)
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
    """Call ``receive(arguments, output)`` after every call of `module`; returns a function that ends this.

    Lists among the arguments are as they were before the call.
    """
    begun: list[dict[str, Any]] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begun.append(renewed(named_arguments(module, args, kwargs)))

    def after(_module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any) -> None:
        receive(begun.pop(), output)

    handles = (
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    )

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


@dataclass(frozen=True)
class CallPattern:
    """What the calls of a denoiser by its pipeline have in common.

    Attributes:
        timestep: name of the argument.
        layout: of the arguments and of the output, named `OUTPUT`; the parts of each sample. Both halves of guidance
            are samples of their own.
        same_time: whether the samples of a batch need the same timestep: some layer has its samples along another
            dimension than the first, where a scale for each sample would go wrong.
        one_at_a_time: whether the pipeline calls it for one image after the other.
    """

    timestep: str
    layout: Layout
    same_time: bool = False
    one_at_a_time: bool = False

    def completed(self, arguments: dict[str, Any], output: Any = None) -> dict[str, Any]:
        """Arguments of a call with a timestep for every sample, and with its output unless None."""
        complete = {name: value for name, value in arguments.items() if name != "return_dict"}
        time = torch.as_tensor(complete[self.timestep])
        if time.numel() == 1:
            others = {name: value for name, value in complete.items() if name != self.timestep}
            complete[self.timestep] = time.reshape(1).expand(samples_in(self.layout, others))
        return complete if output is None else complete | {OUTPUT: plain_output(output)}


def observe_calls(pipeline: Any, denoiser: nn.Module, request: Request, seed: int) -> CallPattern:
    """Compare the calls of a denoiser while one image is generated, and the same image twice in one batch.

    Where the pipeline takes one image at a time, or calls the denoiser for two images with arguments of another form
    (Latte shortens the text of a single one), images are recorded one after the other.

    Few calls are computed: where the arguments have known shapes, the denoisers of the pipeline return an earlier
    output, because the form of the calls does not depend on it.

    Raises:
        StepquantError: if the calls differ in more than the number of samples, or as `generate`.
    """
    one = _observe(pipeline, denoiser, request, [0], seed)
    called = f"{type(pipeline).__name__} calls its {type(denoiser).__name__}"
    if one.first is None:
        raise StepquantError(f"{called} 0 times; expected at least one call. Leave it out.")
    try:
        two = _observe(pipeline, denoiser, request, [0, 0], seed) if takes_batches(pipeline) else None
        if two is not None and len(two.forms) == len(one.forms):
            layout: dict[str, Part | None] = {}
            for call, doubled in zip(one.forms, two.forms, strict=True):
                for path, part in find_layout(call, doubled).items():
                    layout[path] = layout.get(path) or part
            timestep = TimestepReader.of(denoiser).name
            return _pattern(timestep, layout, one.forms[0], _grow_elsewhere(one.layers, two.layers))
    except (RejectedError, UnknownLayoutError):
        two = None
    if two is not None and len(two.forms) != 2 * len(one.forms):
        raise StepquantError(
            f"{called} {len(one.forms)} times for one image and {len(two.forms)} times for two; expected the same "
            "calls with more samples. Leave it out."
        )
    return replace(pattern_of_call(denoiser, one.first), one_at_a_time=True)


def pattern_of_call(denoiser: nn.Module, arguments: dict[str, Any]) -> CallPattern:
    """The pattern of the calls of a denoiser, found by calling it with the samples of one call doubled.

    Raises:
        StepquantError: as `doubled_call`.
    """
    timestep = TimestepReader.of(denoiser).name
    layers: list[dict[str, tuple[int, ...]]] = [{}, {}]
    remove = _on_layers(denoiser, lambda name, shape: layers[name in layers[0]].setdefault(name, shape))
    try:
        doubled, output, output_twice = doubled_call(denoiser, arguments)
    finally:
        remove()
    one = arguments | {OUTPUT: output}
    return _pattern(timestep, find_layout(one, doubled | {OUTPUT: output_twice}), one, _grow_elsewhere(*layers))


def _pattern(timestep: str, layout: dict[str, Part | None], call: dict[str, Any], same_time: bool) -> CallPattern:
    if layout.get(timestep) is None and torch.as_tensor(call[timestep]).numel() == 1:
        layout[timestep] = Rows(count=min(part.count for part in layout.values() if isinstance(part, Rows | Entries)))
    return CallPattern(timestep, divided(layout), same_time)


@dataclass
class _Observed:
    """Calls of a denoiser.

    Attributes:
        forms: arguments and output of each, with tensors on the meta device.
        layers: shapes of the inputs of its layers in the first call.
        first: arguments of the first.
    """

    forms: list[dict[str, Any]]
    layers: dict[str, tuple[int, ...]]
    first: dict[str, Any] | None = None


def _observe(pipeline: Any, denoiser: nn.Module, request: Request, indices: Sequence[int], seed: int) -> _Observed:
    observed = _Observed([], {})

    def receive(arguments: dict[str, Any], output: Any) -> None:
        arguments = {name: value for name, value in arguments.items() if name != "return_dict"}
        if observed.first is None:
            observed.first = _copied(arguments)
        call = arguments | {OUTPUT: plain_output(output)}
        observed.forms.append(pytree.tree_map_only(Tensor, lambda x: torch.empty_like(x, device="meta"), call))

    inner = set(denoiser.modules())
    others = [part for part in denoisers(pipeline).values() if not inner & set(part.modules())]
    removals = [on_call(denoiser, receive), _on_layers(denoiser, observed.layers.setdefault)]
    try:
        with replaced_forwards({module: _repeating(module.forward) for module in (denoiser, *others)}):
            generate(pipeline, request, indices, seed, decode=False, split=False)
    finally:
        for remove in removals:
            remove()
    return observed


def _on_layers(denoiser: nn.Module, receive: Callable[[str, tuple[int, ...]], Any]) -> Callable[[], None]:
    """Call ``receive(name, shape)`` with the input of each layer; returns a function that ends this."""

    def hook(name: str) -> Callable[..., None]:
        def see(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                receive(name, tuple(args[0].shape))

        return see

    layers = [(name, module) for name, module in denoiser.named_modules() if can_quantize(module)]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in layers]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


def _grow_elsewhere(one: dict[str, tuple[int, ...]], two: dict[str, tuple[int, ...]]) -> bool:
    """Whether the input of a layer grows with the number of samples along another dimension than the first."""
    return any(name in two and shape[1:] != two[name][1:] for name, shape in one.items())


def _repeating(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that computes its first call with arguments of certain shapes, and repeats the output afterwards."""
    outputs: list[tuple[Any, Any]] = []

    @wraps(compute)
    def forward(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        form = tree, [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]
        known = next((output for other, output in outputs if other == form), None)
        if known is None:
            known = compute(*args, **kwargs)
            outputs.append((form, _copied(known)))
        return _copied(known)

    return forward


class _EnoughRecorded(Exception):
    """Ends generation, of which no more is needed."""


def _copied(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, pytree.tree_map_only(Tensor, torch.detach, tree))
