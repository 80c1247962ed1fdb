"""The weight of a quantized layer as a tensor that is dequantized only when a value is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stepquant.errors import StepquantError


class DequantizedWeight(Tensor):
    """A read-only tensor whose shape, dtype and device are known at once, and whose values are computed by each use.

    Args:
        shape, dtype, device: of the weight.
        values: returns the values, of this shape and of any dtype and device.
    """

    _values: Callable[[], Tensor]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device, values: Callable[[], Tensor]
    ) -> DequantizedWeight:
        weight: DequantizedWeight = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        weight._values = values
        return weight

    def dequantize(self) -> Tensor:
        """The values as an ordinary tensor."""
        return self._values().to(self.device, self.dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self.dequantize())

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dequantize()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        written = [argument.name for argument in func._schema.arguments if argument.alias_info and argument.is_write]
        named = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)) | (kwargs or {})
        if any(isinstance(named.get(name), cls) for name in written):
            raise StepquantError(
                f"{func} changes the weight of a quantized layer in place; expected only reads. Change the "
                "full-precision model, and quantize that."
            )
        args, kwargs = pytree.tree_map_only(cls, cls.dequantize, (args, kwargs or {}))
        return func(*args, **kwargs)
