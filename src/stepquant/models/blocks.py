"""Units of reconstruction, found from the lists of modules of a denoiser and the order in which it calls them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from stepquant.models.dataflow import DataFlow, is_layer


class Blocks:
    """The blocks of a denoiser, in execution order.

    Members of lists that execute one after another are blocks, unless they contain such lists themselves, as the stages
    of a UNet do. So is everything outside of them: a module of embeddings, or a single layer.

    Attributes:
        names: disjoint modules that together contain all layers that were called.
        repeated: those of them, in the same order, that are members of lists and have several layers.
    """

    def __init__(self, model: nn.Module, flow: DataFlow) -> None:
        self._flow = flow
        self._called = {name: index for index, name in enumerate(flow.order)}
        self._repeated: dict[str, None] = {}
        names = list(self._children("", model))
        self.names = sorted(names, key=self._called.__getitem__)
        self.repeated = [name for name in self.names if name in self._repeated]

    def _children(self, name: str, module: nn.Module) -> Iterator[str]:
        member = isinstance(module, nn.ModuleList | nn.Sequential)
        for child_name, child in module.named_children():
            yield from self._split(f"{name}.{child_name}".lstrip("."), child, member)

    def _split(self, name: str, module: nn.Module, member: bool) -> Iterator[str]:
        layers = self._layers(name)
        if not layers:
            return
        if name not in self._called or self._contains_sequence(name, module):
            yield from self._children(name, module)
        elif member or is_layer(module):
            if len(layers) > 1:
                self._repeated[name] = None
            yield name
        elif len(layers) == 1:
            yield layers[0]
        elif self._mixes_layers_and_modules(name, module):
            yield from self._children(name, module)
        else:
            yield name

    def _layers(self, name: str) -> list[str]:
        """The called layers inside of a module, or the module itself, in execution order."""
        return [layer for layer in self._flow.inputs if f"{layer}.".startswith(f"{name}.")]

    def _contains_sequence(self, name: str, module: nn.Module) -> bool:
        """Whether there is a list of modules below that execute one after another; experts side by side do not."""
        for path, submodule in module.named_modules():
            if isinstance(submodule, nn.ModuleList | nn.Sequential):
                prefix = f"{name}.{path}".rstrip(".")
                members = [self._layers(f"{prefix}.{child}") for child, _ in submodule.named_children()]
                compound = [layers for layers in members if len(layers) > 1]
                fewest = 2 if isinstance(submodule, nn.Sequential) else 1
                if len(compound) >= fewest and all(self._follows(*pair) for pair in pairwise(compound)):
                    return True
        return False

    def _follows(self, earlier: list[str], later: list[str]) -> bool:
        return any(self._flow.ancestors[layer] & set(earlier) for layer in later)

    def _mixes_layers_and_modules(self, name: str, module: nn.Module) -> bool:
        children = [child for path, child in module.named_children() if self._layers(f"{name}.{path}")]
        return len({is_layer(child) for child in children}) == 2
