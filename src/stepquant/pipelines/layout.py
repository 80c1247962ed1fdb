"""Find which parts of a call's arguments belong to its samples, by comparing calls with different numbers of samples.

A value is any tree of tensors, numbers, None, tuples, lists and dictionaries. Its parts are named by their path, such
as ``added_cond_kwargs.time_ids``. `pack` takes the parts of some samples out of a value, and `unpack` makes a value for
any samples out of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stepquant.errors import StepquantError


@dataclass(frozen=True)
class Rows:
    """A tensor with `count` consecutive entries along `dim` for each sample, such as the frames of a video."""

    dim: int = 0
    count: int = 1


@dataclass(frozen=True)
class Entries:
    """A list or tuple with `count` consecutive entries for each sample, each with the same tree."""

    count: int = 1


@dataclass(frozen=True)
class Multiple:
    """A whole number that is `count` times the number of samples."""

    count: int = 1


Part = Rows | Entries | Multiple
Layout = Mapping[str, Part | None]
"""Path -> how the part there belongs to samples; None for a tensor that all samples share. Everything else is a
constant."""


def find_layout(one: Any, other: Any, counts: tuple[int, int] = (1, 2)) -> dict[str, Part | None]:
    """Compare the same value in two calls, for different numbers of samples.

    Args:
        counts: samples of the two calls; apart from their number, the samples must be alike.

    Raises:
        StepquantError: if a part depends on the number of samples in a way that is not known, naming it.
    """
    layout: dict[str, Part | None] = {}
    _compare("", one, other, counts, layout)
    return layout


def _compare(path: str, one: Any, other: Any, counts: tuple[int, int], layout: dict[str, Part | None]) -> None:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        layout[path] = _compare_shapes(path, tuple(one.shape), tuple(other.shape), counts)
        return
    sizes = _size(one), _size(other)
    if sizes != (None, None) and sizes[0] != sizes[1] and type(one) is type(other):
        kind = Entries if isinstance(one, list | tuple) else Multiple
        layout[path] = kind(_per_sample(path, sizes, counts))
        return
    (children, tree), (others, other_tree) = _children(one), _children(other)
    if tree != other_tree:
        raise _unknown(path, f"{_described(one)} for {counts[0]} samples and {_described(other)} for {counts[1]}")
    for name, child, other_child in zip(_names(one, children), children, others, strict=True):
        _compare(f"{path}.{name}" if path else name, child, other_child, counts, layout)


def _compare_shapes(path: str, one: tuple[int, ...], other: tuple[int, ...], counts: tuple[int, int]) -> Rows | None:
    if one == other:
        return None
    differing = [dim for dim, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
    if len(one) != len(other) or len(differing) > 1:
        raise _unknown(path, f"a tensor {list(one)} for {counts[0]} samples and {list(other)} for {counts[1]}")
    dim = differing[0]
    return Rows(dim, _per_sample(path, (one[dim], other[dim]), counts))


def _per_sample(path: str, sizes: tuple[int | None, int | None], counts: tuple[int, int]) -> int:
    one, other = sizes
    assert one is not None and other is not None
    count = one // counts[0]
    if count < 1 or (one, other) != (count * counts[0], count * counts[1]):
        raise _unknown(path, f"of size {one} for {counts[0]} samples and {other} for {counts[1]}")
    return count


class UnknownLayoutError(StepquantError):
    """A part of a call depends on the number of samples in a way that is not known.

    Attributes:
        found: what the part is.
    """

    def __init__(self, found: str) -> None:
        super().__init__(
            f"in the calls of the denoiser, {found}; expected parts that grow with the number of samples in one "
            "dimension. Quantize the model through a pipeline whose calls hold independent samples."
        )
        self.found = found


def _unknown(path: str, found: str) -> UnknownLayoutError:
    return UnknownLayoutError(f"{path or 'the output'} is {found}")


def _size(value: Any) -> int | None:
    """The length of a list or tuple, or a whole number."""
    if isinstance(value, list | tuple):
        return len(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _described(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _children(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The entries of a list, tuple, dictionary or output of diffusers; of anything else, none."""
    children, tree = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
    return ([], tree) if tree.is_leaf() else (children, tree)


def _names(value: Any, children: Sequence[Any]) -> list[str]:
    return [str(key) for key in value] if isinstance(value, dict) else [str(index) for index in range(len(children))]


def samples_in(layout: Layout, value: Any) -> int:
    """The number of samples in a value, according to its first part that belongs to samples.

    Raises:
        StepquantError: if no part does.
    """
    found: list[int] = []

    def see(path: str, part: Any) -> Any:
        kind = layout.get(path)
        if isinstance(kind, Rows):
            found.append(part.shape[kind.dim] // kind.count)
        elif isinstance(kind, Entries):
            found.append(len(part) // kind.count)
        return part

    _map("", value, layout, see)
    if not found:
        raise StepquantError("a recorded call has no tensor that belongs to its samples; expected the noisy samples.")
    return found[0]


def with_unseen(layout: Layout, value: Any) -> Layout:
    """The layout with tensors that the compared calls did not have, such as a mask that only unequal prompts need.

    One with as many rows as there are samples is taken to have one for each.
    """
    unseen: dict[str, Part | None] = {}

    def see(path: str, part: Any) -> Any:
        if isinstance(part, Tensor) and path not in layout and part.dim() and len(part) == samples_in(layout, value):
            unseen[path] = Rows()
        return part

    _map("", value, layout, see)
    return {**layout, **unseen}


def divided(layout: Layout) -> dict[str, Part | None]:
    """The layout of the samples that one image has, such as both halves of guidance, each as a sample of its own.

    The part with the fewest entries per image has one for each sample.

    Raises:
        StepquantError: if another part has a number of entries that cannot be divided among them.
    """
    parts = {path: part for path, part in layout.items() if part is not None and not isinstance(part, Multiple)}
    fewest = min((part.count for part in parts.values()), default=1)
    result: dict[str, Part | None] = {}
    for path, part in layout.items():
        if part is None:
            result[path] = None
            continue
        if part.count % fewest:
            raise _unknown(path, f"of {part.count} entries per image, where another part has {fewest}")
        count = part.count // fewest
        result[path] = Rows(part.dim, count) if isinstance(part, Rows) else type(part)(count)
    return result


@dataclass(frozen=True)
class Stored:
    """Stands in a template for a part that `pack` took out under this name; `rows` is None inside of `Listed`."""

    name: str
    rows: Rows | None


@dataclass(frozen=True)
class Listed:
    """Stands in a template for a list, or tuple, with the entries of each sample in turn: `entries` of one sample."""

    entries: Any
    is_tuple: bool


def pack(
    value: Any,
    layout: Layout,
    chosen: Sequence[int] | None = None,
    constant: Callable[[str, Any], Any] = lambda _path, part: part,
) -> tuple[Any, dict[str, Tensor]]:
    """Take the parts of samples out of a value.

    Args:
        chosen: indices of the k samples; None for all. Their parts must have the same shapes.
        constant: what stands in the template for a part that belongs to no sample.

    Returns:
        A template for `unpack`, and name -> tensor [k, ...], or [k, count, ...] where samples have several rows.

    Raises:
        StepquantError: for a tensor that the layout does not know.
    """
    tensors: dict[str, Tensor] = {}

    def take(path: str, part: Any) -> Any:
        kind = layout.get(path)
        if isinstance(kind, Rows):
            rows = part.movedim(kind.dim, 0)
            if kind.count > 1:
                rows = rows.unflatten(0, (-1, kind.count))
            tensors[path] = rows if chosen is None else torch.stack([rows[index] for index in chosen])
            return Stored(path, kind)
        if isinstance(kind, Entries):
            return _pack_entries(path, part, kind.count, chosen, constant, tensors)
        if isinstance(kind, Multiple):
            return kind
        if isinstance(part, Tensor) and path not in layout:
            raise _unknown(path, "a tensor in some calls and not in others")
        return constant(path, part)

    return _map("", value, layout, take), tensors


def _pack_entries(
    path: str,
    value: Any,
    count: int,
    chosen: Sequence[int] | None,
    constant: Callable[[str, Any], Any],
    tensors: dict[str, Tensor],
) -> Listed:
    samples = range(len(value) // count) if chosen is None else chosen
    each = [pytree.tree_flatten(list(value[index * count : (index + 1) * count])) for index in samples]
    leaves = []
    for index, column in enumerate(zip(*(leaves for leaves, _ in each), strict=True)):
        name = f"{path}.{index}"
        if isinstance(column[0], Tensor):
            tensors[name] = torch.stack(column)
            leaves.append(Stored(name, None))
        else:
            leaves.append(constant(name, column[0]))
    return Listed(pytree.tree_unflatten(leaves, each[0][1]), isinstance(value, tuple))


def unpack(
    template: Any, tensors: Mapping[str, Tensor], samples: int, constant: Callable[[Any], Any] = lambda part: part
) -> Any:
    """The value for some samples, the inverse of `pack`.

    Args:
        tensors: those parts for the k samples, [k, ...].
        samples: k.
        constant: the part that a stand-in for a constant means.
    """

    def fill(part: Any) -> Any:
        if isinstance(part, Stored) and part.rows is not None:
            rows = tensors[part.name]
            return (rows.flatten(0, 1) if part.rows.count > 1 else rows).movedim(0, part.rows.dim).contiguous()
        if isinstance(part, Listed):
            entries = [entry for index in range(samples) for entry in fill_entries(part.entries, index)]
            return tuple(entries) if part.is_tuple else entries
        if isinstance(part, Multiple):
            return part.count * samples
        return constant(part)

    def fill_entries(entries: Any, index: int) -> Any:
        def fill_entry(part: Any) -> Any:
            return tensors[part.name][index] if isinstance(part, Stored) else constant(part)

        return pytree.tree_map(fill_entry, entries)

    return pytree.tree_map(fill, template)


def _map(path: str, value: Any, layout: Layout, function: Callable[[str, Any], Any]) -> Any:
    """Replace every part of a value that the layout knows, or that has no parts itself, by ``function(path, part)``."""
    children, tree = _children(value)
    if tree.is_leaf() or layout.get(path) is not None:
        return function(path, value)
    names = _names(value, children)
    paths = [f"{path}.{name}" if path else name for name in names]
    parts = [_map(path, child, layout, function) for path, child in zip(paths, children, strict=True)]
    return pytree.tree_unflatten(parts, tree)
