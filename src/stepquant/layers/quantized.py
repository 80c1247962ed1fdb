"""Quantized layers: packed integers and tables in the state dict, executed by a runtime's kernel.

The buffers are the checkpoint's tensors, named ``conv_in.weight_packed`` etc. A `LayerFormat` in the model's
configuration gives their shapes and bits, so an empty layer can be created first and filled from a file later. A
runtime (``stepquant.runtime``) reads `QuantizedModule.layer` and installs `kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stepquant.core.packing import pack, packed_bytes, unpack
from stepquant.core.qtensor import QTensor, QuantizedLayer
from stepquant.core.transforms import KINDS
from stepquant.errors import StepquantError
from stepquant.layers.buffers import (
    TransformBuffers,
    fill_grid,
    has_buffers_of,
    keep_dtypes,
    read_grid,
    register_grid,
)
from stepquant.layers.clock import StepClock
from stepquant.layers.format import LayerFormat
from stepquant.layers.kernel import Kernel
from stepquant.layers.time_cache import TimeCache
from stepquant.layers.weight import DequantizedWeight

QuantizedT = TypeVar("QuantizedT", bound="QuantizedModule")


class QuantizedModule(nn.Module):
    """Base class of quantized layers: the stored tensors and the installed kernel.

    Buffers:
        weight_packed: uint8, the weight's codes in the layout of `core.packing.pack`. They stay in CPU memory when
            the module moves to an accelerator, where kernels hold the weight in another layout.
        weight_scale: float32 [1, G, out]; weight_zero_point: uint8 [1, G, out].
        bias: float32 [out], or None.
        input_scale: float32 [R, G, 1]; input_zero_point: uint8 [R, G, 1]; absent if the activation is not quantized.
        input_bits: uint8 [R], present if rows differ in bits.
        transforms.0.factor, ...: tensors of the layer's transforms, in order.

    Attributes:
        weight: the dequantized weight, read-only; see `DequantizedWeight`.
        anchor: an empty parameter, which is not stored. Its dtype and device are those of the layer it replaces, for
            code that reads ``next(module.parameters())``.

    A subclass defines `channel_dim`, the channel dimension of the input, and `like`.
    """

    channel_dim = -1
    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None
    input_scale: Tensor
    input_zero_point: Tensor

    def __init__(self, weight_shape: tuple[int, ...], bias: bool, layer_format: LayerFormat, clock: StepClock) -> None:
        super().__init__()
        self.weight_shape = tuple(weight_shape)
        self.format = layer_format
        self.clock = clock
        self.kernel: Kernel | None = None
        self.make_kernel: Callable[[QuantizedModule], Kernel] | None = None
        self.kernel_device: torch.device | None = None
        self.time_cache: TimeCache | None = None
        self._integers: Callable[[], Tensor] | None = None
        self._reloaded = False
        out, inputs = weight_shape[:2]
        stored = packed_bytes(math.prod(weight_shape), layer_format.weight.bits)
        self.register_buffer("weight_packed", torch.zeros(stored, dtype=torch.uint8))
        register_grid(self, "weight", layer_format.weight, out)
        self.register_buffer("bias", torch.zeros(out, dtype=torch.float32) if bias else None)
        if layer_format.input is not None:
            register_grid(self, "input", layer_format.input)
        identities = [KINDS[transform.kind].identity(inputs) for transform in layer_format.transforms]
        self.transforms = nn.ModuleList(TransformBuffers(identity) for identity in identities)
        self.anchor = _anchor(torch.float32, "cpu")
        self.register_load_state_dict_post_hook(_renew_reloaded)

    @property
    def weight(self) -> Tensor:
        shape = self.in_torch_layout(torch.empty(self.weight_shape, device="meta")).shape
        return DequantizedWeight(shape, self.dtype, self.device, self._dequantize)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the layer that this one replaces; follows ``half()`` and ``to(dtype)``, unlike the buffers."""
        return self.anchor.dtype

    @property
    def device(self) -> torch.device:
        """Device of the module's buffers, except `weight_packed`."""
        return self.weight_scale.device

    def _dequantize(self) -> Tensor:
        return self.in_torch_layout(self.layer().original_weight())

    def in_torch_layout(self, weight: Tensor) -> Tensor:
        """A weight [out, in, *kernel] as a view in the layout of the torch layer."""
        return weight

    @staticmethod
    def accepts(module: nn.Module) -> bool:
        """Whether this class can replace `module`, an instance of the class it is registered for."""
        return True

    @classmethod
    def like(cls, module: Any, layer_format: LayerFormat, clock: StepClock) -> QuantizedModule:
        """Create an empty layer with the shape of the full-precision `module`."""
        raise NotImplementedError

    def fill(self, layer: QuantizedLayer) -> None:
        """Copy the tensors of a layer of the same format."""
        self.weight_packed, self._integers = pack(layer.weight.codes, layer.weight.bits), None
        fill_grid(self, "weight", layer.weight.grid)
        self.bias = None if layer.bias is None else layer.bias.detach().float().clone()
        if layer.input is not None:
            fill_grid(self, "input", layer.input)
        for buffers, transform in zip(self._transforms(), layer.transforms, strict=True):
            buffers.fill(transform)

    def layer(self) -> QuantizedLayer:
        """Unpack and check the layer, on the CPU; raises `StepquantError` if it is damaged."""
        codes = unpack(self._packed().cpu(), self.weight_shape, self.format.weight.bits)
        layer = QuantizedLayer(
            QTensor(codes, read_grid(self, "weight", self.format.weight).to("cpu")),
            None if self.bias is None else self.bias.cpu(),
            None if self.format.input is None else read_grid(self, "input", self.format.input).to("cpu"),
            tuple(buffers.transform().to("cpu") for buffers in self._transforms()),
        )
        layer.check()
        return layer

    def _transforms(self) -> list[TransformBuffers]:
        return list(self.transforms)  # type: ignore[arg-type]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """None without `recurse`: accelerate looks for a layer's own parameters in the state dict when it offloads."""
        return super().named_parameters(prefix, recurse, remove_duplicate) if recurse else iter(())

    def release(self, integers: Callable[[], Tensor]) -> None:
        """Free the codes, since a kernel holds them in another layout.

        State dict and `layer` still contain them. A tensor of the same shape, dtype and device, which takes one byte,
        replaces them.

        Args:
            integers: returns the weight's `QTensor.integers`.
        """
        self._integers = integers
        self.weight_packed = self.weight_packed.new_zeros(1).expand(self.weight_packed.shape)

    def restore(self) -> None:
        """Undo `release`."""
        self.weight_packed, self._integers = self._packed(), None

    def _packed(self) -> Tensor:
        """The codes in the layout of the checkpoint."""
        if self._integers is None:
            return self.weight_packed
        grid = read_grid(self, "weight", self.format.weight)
        return pack(QTensor.of_integers(self._integers().to(grid.scale.device), grid).codes, grid.bits)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight_packed"] = self._packed()
        del destination[f"{prefix}anchor"]

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, missing: list[str], *args: Any
    ) -> None:
        self._reloaded = has_buffers_of(self, state_dict, prefix)
        if self._reloaded:
            self.restore()
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)
        if f"{prefix}anchor" in missing:
            missing.remove(f"{prefix}anchor")

    def use(self, make_kernel: Callable[[QuantizedModule], Kernel]) -> None:
        """Run the kernel that `make_kernel` returns, created again on each device that the layer is moved to."""
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
        anchor = self._parameters.pop("anchor")
        keep_dtypes(self, lambda: super(QuantizedModule, self)._apply(fn, recurse=False))
        assert anchor is not None
        self.anchor = nn.Parameter(fn(anchor.detach()), requires_grad=False)
        self.transforms._apply(fn)
        if stored.device.type == "cpu" and self.weight_packed.device.type not in ("cpu", "meta"):
            self.weight_packed = stored
        if self.kernel_device not in (None, self.device):
            self._renew_kernel()
        return self

    def forward(self, input: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        # Named as in torch's layers, since some models call them by keyword.
        if self.kernel is None:
            raise RuntimeError("the layer has no kernel; call stepquant.runtime.prepare(model) first")
        if self.time_cache is not None:
            return self.time_cache(input, self.clock.time, self.kernel, self._run)
        return self._run(input)

    def _run(self, x: Tensor) -> Tensor:
        if self.kernel_device not in (None, self.device):  # moved tensor by tensor, as accelerate does
            self.anchor = _anchor(self.dtype, self.device)
            self._renew_kernel()
        assert self.kernel is not None
        return self.kernel(x, self.clock.row)


QUANTIZED: dict[type[nn.Module], type[QuantizedModule]] = {}
"""Class of a full-precision layer -> class that replaces it."""


def quantizes(kind: type[nn.Module]) -> Callable[[type[QuantizedT]], type[QuantizedT]]:
    """Class decorator: register the quantized form of `kind`."""

    def register(cls: type[QuantizedT]) -> type[QuantizedT]:
        QUANTIZED[kind] = cls
        return cls

    return register


def can_quantize(module: nn.Module) -> bool:
    """Whether `module` has a quantized form: a linear, or a convolution with zero padding."""
    return _quantized_class(module) is not None


def kept_in_float32(model: nn.Module) -> frozenset[str]:
    """Names of the layers that the model's class keeps in float32 (``_keep_in_fp32_modules`` of diffusers).

    They must not be quantized: T5's ``wo`` overflows in half precision, and Wan embeds its time in their dtype.
    """
    parts = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return frozenset(
        name for name, module in model.named_modules() if can_quantize(module) and parts & {*name.split(".")}
    )


def empty_like(module: nn.Module, layer_format: LayerFormat, clock: StepClock) -> QuantizedModule:
    """Create an empty quantized layer with the shape of `module`.

    Raises:
        StepquantError: if `module` has no quantized form, or the groups of the format do not sum to its channels.
    """
    cls = _quantized_class(module)
    if cls is None:
        raise StepquantError(f"a layer to be quantized is a {type(module).__name__}; expected a linear or convolution.")
    layer = cls.like(module, layer_format, clock)
    inputs = layer.weight_shape[1]
    for grid, channels in ((layer_format.weight, inputs), (layer_format.input, inputs * getattr(layer, "groups", 1))):
        if grid is not None and grid.groups and sum(grid.groups) != channels:
            raise StepquantError(
                f"groups of {sum(grid.groups)} channels were given for a layer of {channels} input channels. "
                "The checkpoint is damaged; quantize the model again."
            )
    weight: Any = module.weight
    layer.anchor = _anchor(weight.dtype, "cpu")
    return layer


def quantized_like(module: nn.Module, layer: QuantizedLayer, clock: StepClock) -> QuantizedModule:
    """Create a quantized layer with the shape of `module`, filled with `layer`, without a kernel."""
    quantized = empty_like(module, LayerFormat.of(layer), clock)
    quantized.fill(layer)
    return quantized


def quantized_modules(model: nn.Module) -> dict[str, QuantizedModule]:
    """All quantized layers of `model`, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedModule)}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule with the dotted `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _quantized_class(module: nn.Module) -> type[QuantizedModule] | None:
    found = (cls for kind, cls in QUANTIZED.items() if _computes_like(module, kind) and cls.accepts(module))
    return next(found, None)


def _computes_like(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` is of a class, or of a subclass that computes the same."""
    cls = type(module)
    same = cls.forward is kind.forward or cls.__module__.startswith(("stepquant.", "diffusers.models.lora"))
    return isinstance(module, kind) and same


def _anchor(dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    return nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)


def _renew_reloaded(module: nn.Module, _incompatible_keys: Any) -> None:
    """Recreate the kernel after a state dict was loaded, transforms included."""
    assert isinstance(module, QuantizedModule)
    if module._reloaded:
        module._reloaded = False
        module._renew_kernel()
