"""Arguments of a denoiser's call: by name, and as named tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


def named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module` by name, so that ``module(**arguments)`` repeats it.

    Arguments that were left out are absent.
    """
    signature = inspect.signature(module.forward)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def renewed(arguments: Any) -> Any:
    """The same arguments in new lists and dictionaries.

    A UNet takes the residuals of a T2I-Adapter out of the list that it is given, so that a second call with the same
    list would be without them.
    """
    return pytree.tree_map(lambda leaf: leaf, arguments)


def flatten(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """An argument as named values: itself, or the entries of a dictionary or list under dotted names."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield f"{name}.{key}", entry
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield f"{name}.{index}", entry
    else:
        yield name, value


def nest(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments from flat names, the inverse of `flatten`."""
    arguments: dict[str, Any] = {}
    for name, tensor in tensors.items():
        outer, _, inner = name.partition(".")
        if inner.isdigit():
            arguments[outer] = [*arguments.get(outer, []), tensor]
        else:
            arguments[outer] = {**arguments.get(outer, {}), inner: tensor} if inner else tensor
    return arguments


def plain_output(output: Any) -> Any:
    """An output of diffusers as a tuple; any other as it is."""
    return output.to_tuple() if hasattr(output, "to_tuple") else output
