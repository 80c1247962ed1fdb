"""Quantized layers as they ship: packed integers and tables in the state dict, executed by a runtime's kernel.

The buffers below are the checkpoint's tensors under the usual names (``unet.conv_in.weight_packed``, ...). What their
shapes and bits are is a `LayerFormat`, kept in the model's configuration; so an empty layer can be built first and
filled from a file later. A runtime (``stepquant.runtime``) reads `QuantizedModule.layer` and installs `kernel`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, cast

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor, nn

from stepquant.core.packing import pack, packed_bytes, unpack
from stepquant.core.qtensor import ActivationTable, QuantizedLayer, QuantizedWeight, spread_zero_point
from stepquant.layers.clock import StepClock
from stepquant.layers.time_cache import TimeMemo

ModuleT = TypeVar("ModuleT", bound=nn.Module)
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

Bits = Annotated[int, Field(ge=2, le=8)]
MOST_ROWS = 100_000
"""No schedule has more timesteps; a checkpoint that claims more is damaged."""


class LayerFormat(BaseModel):
    """Shape of a layer's quantized tensors, as JSON holds it.

    Attributes:
        weight_bits: 2 to 8.
        weight_groups: sizes of the input-channel groups with a weight scale of their own.
        activation_bits: 2 to 8, or None where the activation stays floating point.
        activation_groups: sizes of the channel groups with an activation scale of their own; () means one.
        activation_rows: rows of the activation table, 1 for a static grid.
        smoothed: whether the layer has a `QuantizedLayer.smoothing`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    weight_bits: Bits
    weight_groups: Annotated[tuple[PositiveInt, ...], Field(min_length=1, strict=False)]
    activation_bits: Bits | None = None
    activation_groups: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = ()
    activation_rows: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 1
    smoothed: bool = False

    @model_validator(mode="after")
    def _smoothing_needs_activations(self) -> LayerFormat:
        if self.smoothed and self.activation_bits is None:
            raise ValueError("a layer is smoothed only where its activation is quantized")
        return self

    @classmethod
    def of(cls, layer: QuantizedLayer) -> LayerFormat:
        weight, activation = layer.weight, layer.activation
        if activation is None:
            return cls(weight_bits=weight.bits, weight_groups=weight.group_sizes)
        return cls(
            weight_bits=weight.bits,
            weight_groups=weight.group_sizes,
            activation_bits=activation.bits,
            activation_groups=activation.group_sizes,
            activation_rows=activation.scale.shape[0],
            smoothed=layer.smoothing is not None,
        )


def opaque(function: FunctionT) -> FunctionT:
    """Let torch.compile call `function` as it is: kernels give addresses of tensors to other code."""
    untraced = torch.compiler.disable(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return untraced(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return cast(FunctionT, call)


class Kernel(nn.Module):
    """Executes one layer: ``forward(x, row) -> y``. x is float [B, ...]; row is the clock's, int64 [] or [B].

    A kernel is never changed once built, so copies of a model share it; a layer that is moved to another device gets
    another. What a kernel registers as a buffer is put on the layer's device before it first runs.

    Attributes:
        fuses: whether it takes what is before and after a convolution with it, as ``runtime/native/blocks.py`` asks.
    """

    fuses = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernel:
        return self


class QuantizedModule(nn.Module):
    """What a quantized linear and convolution share: the stored tensors and the installed kernel.

    Buffers:
        weight_packed: uint8, the weight's codes as `numerics.packing.pack` lays them out. They stay in the processor's
            memory when the module goes to an accelerator: there kernels have the weight in a layout of their own.
        weight_scale: float32 [G, out]; weight_zero_point: uint8 [G, out].
        bias: float32 [out], or None.
        input_scale: float32 [R, S]; input_zero_point: uint8 [R, S]; absent when the activation is not quantized.
        input_smoothing: float32 [in]; absent when the layer is not smoothed.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None
    input_scale: Tensor
    input_zero_point: Tensor
    input_smoothing: Tensor

    def __init__(self, weight_shape: tuple[int, ...], bias: bool, layer_format: LayerFormat, clock: StepClock) -> None:
        super().__init__()
        self.weight_shape = tuple(weight_shape)
        self.layer_format = layer_format
        self.clock = clock
        self.kernel: Kernel | None = None
        self.make_kernel: Callable[[QuantizedModule], Kernel] | None = None
        self.kernel_device: torch.device | None = None
        self.memo: TimeMemo | None = None
        self._integers: Callable[[], Tensor] | None = None
        groups, out = len(layer_format.weight_groups), weight_shape[0]
        stored = packed_bytes(math.prod(weight_shape), layer_format.weight_bits)
        self.register_buffer("weight_packed", torch.zeros(stored, dtype=torch.uint8))
        # The type is said: a model may be built under another default.
        self.register_buffer("weight_scale", torch.ones(groups, out, dtype=torch.float32))
        self.register_buffer("weight_zero_point", torch.zeros(groups, out, dtype=torch.uint8))
        self.register_buffer("bias", torch.zeros(out, dtype=torch.float32) if bias else None)
        if layer_format.activation_bits is not None:
            table = (layer_format.activation_rows, max(1, len(layer_format.activation_groups)))
            self.register_buffer("input_scale", torch.ones(table, dtype=torch.float32))
            self.register_buffer("input_zero_point", torch.zeros(table, dtype=torch.uint8))
        if layer_format.smoothed:
            self.register_buffer("input_smoothing", torch.ones(weight_shape[1], dtype=torch.float32))

    def fill(self, layer: QuantizedLayer) -> None:
        """Copy the tensors of `layer`, whose format must be this module's."""
        self.weight_packed, self._integers = pack(layer.weight.codes, layer.weight.bits), None
        self.weight_scale = layer.weight.scale.clone()
        self.weight_zero_point = layer.weight.zero_point.clone()
        self.bias = None if layer.bias is None else layer.bias.detach().float().clone()
        if layer.activation is not None:
            self.input_scale = layer.activation.scale.clone()
            self.input_zero_point = layer.activation.zero_point.clone()
        if layer.smoothing is not None:
            self.input_smoothing = layer.smoothing.clone()

    def layer(self) -> QuantizedLayer:
        """The layer's integers and tables, unpacked and checked, on the CPU; raises `StepquantError` on damage."""
        layer_format = self.layer_format
        stored = {name: buffer.cpu() for name, buffer in self.named_buffers(recurse=False)}
        codes = unpack(self._packed().cpu(), self.weight_shape, layer_format.weight_bits)
        weight = QuantizedWeight(
            codes,
            stored["weight_scale"],
            stored["weight_zero_point"],
            layer_format.weight_bits,
            layer_format.weight_groups,
        )
        activation = None
        if layer_format.activation_bits is not None:
            activation = ActivationTable(
                stored["input_scale"],
                stored["input_zero_point"],
                layer_format.activation_bits,
                layer_format.activation_groups,
            )
        layer = QuantizedLayer(weight, stored.get("bias"), activation, stored.get("input_smoothing"))
        layer.check()
        return layer

    def release(self, integers: Callable[[], Tensor]) -> None:
        """Hold the codes no longer, since a kernel does, in an order of its own: no weight is in memory twice.

        The state dict and `layer` have them as before. What stays in their place has their shape, dtype and device, and
        takes one byte.

        Args:
            integers: gives back what `QuantizedWeight.integers` was.
        """
        self._integers = integers
        self.weight_packed = self.weight_packed.new_zeros(1).expand(self.weight_packed.shape)

    def restore(self) -> None:
        """Undo `release`."""
        self.weight_packed, self._integers = self._packed(), None

    def _packed(self) -> Tensor:
        """The codes as the checkpoint has them."""
        if self._integers is None:
            return self.weight_packed
        layer_format = self.layer_format
        zero_point = spread_zero_point(self.weight_zero_point, layer_format.weight_groups, len(self.weight_shape))
        codes = self._integers().to(self.weight_zero_point.device) + zero_point
        return pack(codes.to(torch.uint8), layer_format.weight_bits)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight_packed"] = self._packed()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        given = has_buffers_of(self, state_dict, prefix)
        if given:
            self.restore()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if given:
            self._renew_kernel()

    @property
    def device(self) -> torch.device:
        """Where the module is, but for `weight_packed`."""
        return self.weight_scale.device

    def use(self, make_kernel: Callable[[QuantizedModule], Kernel]) -> None:
        """Run by the kernel that `make_kernel` gives this layer here, and on every device it is moved to."""
        self.make_kernel = make_kernel
        self._renew_kernel()

    def _renew_kernel(self) -> None:
        if self.make_kernel is None or self.device.type == "meta":
            return
        self.restore()
        if self.device.type != "cpu":
            self.weight_packed = self.weight_packed.cpu()
        self.kernel = self.make_kernel(self).to(self.device)
        self.kernel_device = self.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        stored = self.weight_packed
        keep_dtypes(self, lambda: super(QuantizedModule, self)._apply(fn, recurse=False))
        if stored.device.type == "cpu" and self.weight_packed.device.type not in ("cpu", "meta"):
            self.weight_packed = stored
        if self.kernel_device not in (None, self.device):
            self._renew_kernel()
        return self

    def forward(self, input: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        # Named as in torch's own layers, which some models call by keyword.
        if self.kernel is None:
            raise RuntimeError("no kernel installed: call stepquant.runtime.prepare(model) first")
        if self.memo is not None:
            return self.memo(input, self.clock.time, self.kernel, self._run)
        return self._run(input)

    def _run(self, x: Tensor) -> Tensor:
        if self.kernel_device not in (None, self.device):  # moved tensor by tensor, as accelerate does
            self._renew_kernel()
        assert self.kernel is not None
        return self.kernel(x, self.clock.row)


def has_buffers_of(module: nn.Module, state_dict: dict[str, Tensor], prefix: str) -> bool:
    """Whether a state dict has something of a module's own: an adapter's has not."""
    return any(f"{prefix}{name}" in state_dict for name, _ in module.named_buffers(recurse=False))


def keep_dtypes(module: ModuleT, apply: Callable[[], ModuleT]) -> ModuleT:
    """Let `apply` move the buffers of a module, but not round them: ``model.half()`` must leave scale tables alone."""
    before = dict(module.named_buffers(recurse=False))
    result = apply()
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.dtype != before[name].dtype:
            setattr(module, name, before[name].to(buffer.device))
    return result


class QuantizedLinear(QuantizedModule):
    """Linear in integers; x: float [B, ..., in] -> float [B, ..., out]."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool, layer_format: LayerFormat, clock: StepClock
    ) -> None:
        super().__init__((out_features, in_features), bias, layer_format, clock)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def like(cls, module: nn.Linear, layer_format: LayerFormat, clock: StepClock) -> QuantizedLinear:
        return cls(module.in_features, module.out_features, module.bias is not None, layer_format, clock)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.layer_format}"


class QuantizedConv2d(QuantizedModule):
    """Convolution in integers with zero padding; x: float [B, in, H, W] -> float [B, out, H', W']."""

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        bias: bool,
        layer_format: LayerFormat,
        clock: StepClock,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
    ) -> None:
        super().__init__(weight_shape, bias, layer_format, clock)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups
        self.in_channels, self.out_channels = weight_shape[1] * groups, weight_shape[0]

    @classmethod
    def like(cls, module: nn.Conv2d, layer_format: LayerFormat, clock: StepClock) -> QuantizedConv2d:
        return cls(
            tuple(module.weight.shape),
            module.bias is not None,
            layer_format,
            clock,
            stride=_pair(module.stride),
            padding=_pair(module.padding),
            dilation=_pair(module.dilation),
            groups=module.groups,
        )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}, {self.layer_format}"


def can_quantize(module: nn.Module) -> bool:
    """Whether `module` is a layer this package quantizes: a linear, or a 2-d convolution padded with zeros."""
    if isinstance(module, nn.Linear):
        return True
    return isinstance(module, nn.Conv2d) and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if isinstance(value, (tuple, list)) else (value, value)
    return int(first), int(second)
