"""Data flow of one call of a denoiser: which arguments and which layers each layer's input comes from.

A dispatch mode sees every operation on tensors. The sources of an operation's inputs become those of its outputs; a
layer's output comes from that layer alone. Sources belong to memory, so views share them with what they are views of,
and operations in place add to them.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from stepquant.models.concatenation import Concatenation


@dataclass(frozen=True)
class Sources:
    """Where a tensor comes from.

    Attributes:
        arguments: leaves of the denoiser's arguments that it depends on, as dotted paths, such as ``x.0``.
        layers: linears and convolutions that it comes from directly, that is without another layer between.
    """

    arguments: frozenset[str] = frozenset()
    layers: frozenset[str] = frozenset()

    def __or__(self, other: Sources) -> Sources:
        return Sources(self.arguments | other.arguments, self.layers | other.layers)


@dataclass
class DataFlow:
    """What one call of a denoiser shows.

    Attributes:
        arguments: dotted paths of the leaves that are tensors.
        order: names of the modules that were called, in the order of their first calls, without the root.
        inputs: layer -> sources of its input, of all its calls together; in execution order.
        outputs: sources of the leaves of the denoiser's output that are floating-point tensors, in order.
        output_shapes: their shapes.
        splits: layer -> number of input channels that come from the trunk, of those that read the concatenation of the
            trunk with a skip connection along the channels.
        before_first_skip: the outermost module that finished last before the first such concatenation.
        attentions: module -> calls of ``F.scaled_dot_product_attention`` that it makes itself.
        manual_attentions: modules that multiply by the result of a softmax, which is attention without that function.
    """

    arguments: tuple[str, ...] = ()
    order: dict[str, None] = field(default_factory=dict)
    inputs: dict[str, Sources] = field(default_factory=dict)
    outputs: list[Sources] = field(default_factory=list)
    output_shapes: list[torch.Size] = field(default_factory=list)
    splits: dict[str, int] = field(default_factory=dict)
    before_first_skip: str | None = None
    attentions: Counter[str] = field(default_factory=Counter)
    manual_attentions: dict[str, None] = field(default_factory=dict)
    ancestors: dict[str, frozenset[str]] = field(default_factory=dict)
    """layer -> all layers that its input comes from, directly or through others."""

    def through(self, layers: frozenset[str]) -> frozenset[str]:
        """Return these layers and all before them."""
        return layers.union(*(self.ancestors[layer] for layer in layers))

    def depends_on(self, name: str, arguments: frozenset[str]) -> bool:
        """Return whether a layer inside module `name`, or that layer itself, reads any of these arguments."""
        return any(
            arguments & sources.arguments
            for layer, sources in self.inputs.items()
            if f"{layer}.".startswith(f"{name}.")
        )


def is_layer(module: nn.Module) -> bool:
    """Return whether a module is a linear or a convolution, of any dimension, transposed or not."""
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd)


def leaves_of(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return dotted path -> leaf of the arguments of a call."""
    flat, _ = pytree.tree_flatten_with_path(arguments)
    return {".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path): leaf for path, leaf in flat}


@torch.no_grad()
def trace(model: nn.Module, arguments: dict[str, Any]) -> DataFlow:
    """Call the denoiser once and follow its data.

    Args:
        arguments: of its forward, by name: any trees of tensors and constants. A number is not followed; give it as
            a tensor.

    Returns:
        The data flow. Modules and layers that were not called are absent.
    """
    names = inspect.signature(model.forward).parameters
    options = {"return_dict": False} if "return_dict" in names else {}
    arguments = pytree.tree_map_only(Tensor, Tensor.clone, arguments)  # no two share memory
    tracer = _Tracer(model, leaves_of(arguments))
    hooks = list(tracer.hooks())
    try:
        with tracer, _AttentionCalls(tracer):
            output = model(**(arguments | options))
    finally:
        for hook in hooks:
            hook.remove()
    tracer.finish(output)
    return tracer.flow


class _Tracer(TorchDispatchMode):
    """Follows sources through operations, and modules through hooks.

    Attributes:
        stack: names of the modules that are being called, outermost first.
        in_attention: whether an operation is part of ``F.scaled_dot_product_attention``.
    """

    def __init__(self, model: nn.Module, leaves: dict[str, Any]) -> None:
        super().__init__()
        tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        self.model, self.flow = model, DataFlow(tuple(tensors))
        self.stack: list[str] = []
        self.finished: list[str] = []
        self.in_attention = False
        self._sources: dict[int, tuple[StorageWeakRef, Sources]] = {}
        self._probabilities: dict[int, StorageWeakRef] = {}
        self._concatenations: Any = WeakTensorKeyDictionary()
        for name, tensor in tensors.items():
            self._add(tensor, Sources(frozenset({name})))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = _tensors((args, kwargs))
        result = func(*args, **(kwargs or {}))
        produced = _tensors(result)
        name = func.overloadpacket.__name__
        if name.startswith("new_") or name.endswith("_like"):  # of the same shape, not made of its values
            return result
        sources = self.of(given)
        for tensor in (*produced, *(given[:1] if func._schema.is_mutable else ())):
            self._add(tensor, sources)
        self._follow_probabilities(name, given, produced)
        if name == "cat" and len(given) == 2:
            self._concatenate(given, result)
        else:
            self._follow_concatenation(name, args, given, produced)
        return result

    def of(self, value: Any) -> Sources:
        """Return the sources of all tensors in a tree."""
        merged = Sources()
        for tensor in _tensors(value):
            merged |= self._sources.get(_key(tensor), (None, Sources()))[1]
        return merged

    def _add(self, tensor: Tensor, sources: Sources, replace: bool = False) -> None:
        known = self._sources.get(_key(tensor))
        # The weak reference keeps the address of freed memory from being used again.
        reference = StorageWeakRef(tensor.untyped_storage()) if known is None else known[0]
        before = Sources() if known is None or replace else known[1]
        if known is not None or sources != Sources():
            self._sources[_key(tensor)] = (reference, before | sources)

    def _follow_probabilities(self, name: str, given: list[Tensor], produced: list[Tensor]) -> None:
        """Remember results of softmax, and the modules that multiply by them."""
        read = any(_key(tensor) in self._probabilities for tensor in given)
        if self.in_attention:
            return
        if name == "_softmax" or (read and name in ("_to_copy", "clone", "mul", "div")):
            self._probabilities |= {_key(tensor): StorageWeakRef(tensor.untyped_storage()) for tensor in produced}
        elif read and name in ("bmm", "baddbmm", "mm"):
            self.flow.manual_attentions.setdefault(self.stack[-1])

    def _concatenate(self, given: list[Tensor], result: Tensor) -> None:
        """Remember the concatenation of a trunk and a skip connection along one dimension."""
        trunk, skip = given
        dim = next((dim for dim in range(result.dim()) if result.shape[dim] != trunk.shape[dim]), None)
        if dim is None or trunk.dim() != result.dim():
            return
        of_trunk, of_skip = self.of(trunk).layers, self.of(skip).layers
        before_trunk, before_skip = self.flow.through(of_trunk), self.flow.through(of_skip)
        passes_over = of_skip <= before_trunk and (not of_trunk <= before_skip or _key(trunk) == _key(skip))
        if of_skip and passes_over:
            inside = f"{self.stack[1]}." if len(self.stack) > 1 else " "
            before = next((name for name in reversed(self.finished) if not name.startswith(inside)), None)
            self._concatenations[result] = Concatenation(trunk.shape[dim], dim, before)

    def _follow_concatenation(self, name: str, args: Any, given: list[Tensor], produced: list[Tensor]) -> None:
        found = [(tensor, self._concatenations[tensor]) for tensor in given if tensor in self._concatenations]
        for tensor, concatenation in found[:1]:
            for output in produced:
                kept = concatenation.after(name, args, tensor.shape, output.shape)
                if kept is not None:
                    self._concatenations[output] = kept

    def hooks(self) -> Iterator[Any]:
        """Register hooks on every module; yield their handles."""
        for name, module in self.model.named_modules():
            yield module.register_forward_pre_hook(self._before(name, module), with_kwargs=True, prepend=True)
            yield module.register_forward_hook(self._after(name, module), always_call=True)

    def _before(self, name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self.stack.append(name)
            if name:
                self.flow.order.setdefault(name)
            if is_layer(module):
                self._read(name, module, _tensors((args, kwargs)))

        return hook

    def _after(self, name: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self.stack.pop()
            self.finished.append(name)
            if is_layer(module):
                arguments = self.flow.inputs[name].arguments
                for tensor in _tensors(output):
                    self._add(tensor, Sources(arguments, frozenset({name})), replace=True)

        return hook

    def _read(self, name: str, layer: nn.Module, given: list[Tensor]) -> None:
        flow, sources = self.flow, self.of(given)
        flow.inputs[name] = flow.inputs.get(name, Sources()) | sources
        flow.ancestors[name] = flow.ancestors.get(name, frozenset()) | flow.through(sources.layers - {name})
        for tensor in given[:1]:
            concatenation = self._concatenations.get(tensor)
            channels = tensor.dim() - 1 if isinstance(layer, nn.Linear) else 1
            if concatenation is not None and concatenation.dim == channels:
                flow.splits.setdefault(name, concatenation.split)
                if flow.before_first_skip is None:
                    flow.before_first_skip = concatenation.before

    def finish(self, output: Any) -> None:
        """Note the sources of the denoiser's output."""
        leaves = [tensor for tensor in _tensors(output) if tensor.is_floating_point()]
        self.flow.outputs = [self.of(leaf) for leaf in leaves]
        self.flow.output_shapes = [leaf.shape for leaf in leaves]


class _AttentionCalls(TorchFunctionMode):
    """Counts calls of ``F.scaled_dot_product_attention``, which has another operation on every backend."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.tracer.flow.attentions[self.tracer.stack[-1]] += 1
        self.tracer.in_attention = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.tracer.in_attention = False


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
