"""A linear or convolution in integers: one pass makes codes, one multiplies them and scales what it stores."""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
from torch import Tensor

from stepquant.core.dynamic import DynamicFormat
from stepquant.core.qtensor import Grid
from stepquant.layers.clock import of_samples
from stepquant.layers.kernel import Capabilities, Kernel, Layer, opaque
from stepquant.layers.quantized import QuantizedModule
from stepquant.runtime.native.build import INSTRUCTION_SETS, available, library
from stepquant.runtime.native.library import TYPES, Call, no_memory
from stepquant.runtime.native.memory import scratch
from stepquant.runtime.native.norms import Norm, dense, group_norm
from stepquant.runtime.native.packing import PackedLayer
from stepquant.runtime.native.plan import Plan, Request, form, make_plan
from stepquant.runtime.native.recording import record
from stepquant.runtime.native.tables import rows_of, table_row

MOST_PLANS = 32
"""Plans that a layer keeps, for inputs of different shapes; the oldest makes room for the next."""


class NativeKernel(Kernel):
    """One layer. `forward` is the layer alone; `run` is the layer with everything that can be fused into it.

    If a sample of x has a NaN, the sample's output is NaN throughout. A linear layer whose samples share one row takes
    all of x as one sample. With dynamic activations, only what depends on the NaN's position is NaN.

    Args:
        instructions: one of the available `INSTRUCTION_SETS`; by default the fastest.
        packed: store weights of up to 4 bits as codes, two to a byte, and unpack columns as they are multiplied. The
            results are the same.
    """

    capabilities = Capabilities(
        kernel_dims=frozenset({0, 1, 2, 3}),
        transposed=True,
        dynamic=True,
        grouped_convolutions=True,
        bits_by_row=True,
    )
    fuses = True
    group_norm = staticmethod(group_norm)

    def __init__(self, module: QuantizedModule, *, instructions: str | None = None, packed: bool = False) -> None:
        super().__init__()
        grid, instructions = module.layer().input, instructions or available()[0]
        assert grid is not None
        self.library = library(instructions)
        self.extension = INSTRUCTION_SETS[instructions].code
        self.layer = PackedLayer.of(module, nibbles=packed, halves=instructions != "amx")
        self.rows, self.groups = grid.rows, max(1, len(grid.format.groups))
        self.by_row = [grid.tops]
        if isinstance(grid, Grid):
            self.by_row += [grid.scale.squeeze(2).clone(), grid.zero_point.squeeze(2).int()]
        self.plans: dict[tuple[Any, ...], Plan] = {}

    @classmethod
    def supports(cls, module: Layer) -> bool:
        grouped = getattr(module, "groups", 1) > 1
        return super().supports(module) and not (grouped and isinstance(module.format.input, DynamicFormat))

    @property
    def whole(self) -> bool:
        """Whether all input channels are one piece, so that a pass over codes sees every channel of a position."""
        return len(self.layer.pieces) == 1

    @property
    def lasting(self) -> list[Tensor]:
        """Tensors that every call points into."""
        taps = [geometry.taps for plan in list(self.plans.values()) for geometry in plan.geometries]
        return [*self.by_row, *self.layer.tensors, *taps]

    def integers(self) -> Tensor:
        """The weight as `QTensor.integers` has it: int8 [out, in, *kernel]."""
        return self.layer.integers()

    @opaque
    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        return self.run(x, row)

    def run(
        self,
        x: Tensor,
        row: Tensor,
        *,
        norm: Norm | None = None,
        activation: str | None = None,
        upsample: int = 1,
        extra: int = 0,
        channel_add: Tensor | None = None,
        gate: Tensor | None = None,
        residual: Tensor | None = None,
        factor: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """``((layer(upsample(activation(norm(x)))) + channel_add) * gate + residual) * factor``.

        Args:
            x: float [B, C, *size] for a convolution, [B, ..., in] for a linear; [B, N, in] if an argument differs
                between samples. With ``geglu`` the last dimension is 2 in.
            row: row of the activation table, int64 [] or [B].
            norm: with an epsilon only if `whole`.
            activation: one of `ACTIVATIONS`; after a group normalization only ``silu``, after a layer normalization
                none.
            upsample: 2 repeats every pixel in both directions.
            extra: rows and columns of zeros below and to the right of the image, in addition to the padding.
            channel_add, gate: float32 [B, out] or [1, out], contiguous.
            residual: float, of the output's shape; copied unless it is channels-last, or contiguous for a linear.
            dtype: of the result; by default that of x. A float64 result has the precision of float32.

        Raises:
            StepquantError: if an argument does not fit the layer or x, or memory is not sufficient.
        """
        result_dtype = dtype or x.dtype
        dtype = result_dtype if result_dtype in TYPES else torch.float32
        if residual is not None and residual.dtype not in TYPES:
            residual = residual.float()
        convolution = self.layer.convolution
        x = dense(x, dims=0 if convolution is None else convolution.dims)
        per_step = row.dim() == 1 and self.rows > 1
        pieces = self.layer.pieces
        multiply, add, epsilon = norm or (None, None, None)
        request = (
            x.shape, x.stride(), x.dtype, dtype, per_step,
            None if multiply is None else form(multiply), None if add is None else form(add), epsilon,
            None if channel_add is None else form(channel_add), None if gate is None else form(gate),
            None if residual is None else form(residual), activation, upsample, extra, factor, torch.get_num_threads(),
        )  # fmt: skip
        plan = self.plans.get(request) or self._plan(Request(*request))
        if residual is not None:
            residual = residual.contiguous(memory_format=plan.memory_format)
        y = torch.empty(plan.shape, dtype=plan.dtype, device="cpu", memory_format=plan.memory_format)
        sums = y if len(pieces) == 1 or dtype == torch.float32 else torch.empty_like(y, dtype=torch.float32)
        (top, *tables), step, keep = self._grid(row, plan.batch, per_step)
        for index, piece in enumerate(pieces):
            call = Call.from_buffer_copy(plan.calls[index])
            call.x = x.data_ptr() + plan.offsets[index]
            call.top = top
            if tables:
                call.scale, call.zero_point = (table + piece.group * step for table in tables)
            call.codes = scratch("codes", plan.geometries[index].bytes)
            call.y = (y if index == len(pieces) - 1 else sums).data_ptr()
            if multiply is not None and add is not None:
                call.multiply = multiply.data_ptr() + 4 * piece.start
                call.add = add.data_ptr() + 4 * piece.start
            if gate is not None:
                gate = _of_each(gate, plan.batch)
                call.gate = gate.data_ptr()
            if index > 0:
                call.residual = sums.data_ptr()
            else:
                if channel_add is not None:
                    channel_add = _of_each(channel_add, plan.batch)
                    call.channel_add = channel_add.data_ptr()
                if residual is not None:
                    call.residual = residual.data_ptr()
            address = byref(call)
            if self.library.sq_codes(address) or self.library.sq_layer(address):
                raise no_memory()
            record(call, plan.geometries[index].bytes)
        del keep
        if convolution is not None:
            if convolution.transposed:
                y = convolution.finished(y, tuple(x.shape[2:]))
            elif convolution.dims == 1:
                y = y.squeeze(2)
        return y if dtype is result_dtype else y.to(result_dtype)

    def _plan(self, request: Request) -> Plan:
        plan = make_plan(self.layer, request, self.extension)
        if len(self.plans) >= MOST_PLANS:
            self.plans.pop(next(iter(self.plans.copy())), None)  # a copy, because other threads may add to it
        self.plans[request] = plan
        return plan

    def _grid(self, row: Tensor, batch: int, per_step: bool) -> tuple[list[int], int, Any]:
        """Addresses of the largest code, and of the first group's scale and zero point of a fixed grid; bytes from one
        group to the next; and the tensors that the addresses are in."""
        if not per_step:
            at = table_row(row, self.rows)
            return [x.data_ptr() + at * x.stride(0) * 4 for x in self.by_row], 4, None
        rows = of_samples(row, batch)
        tables = [rows_of(values, rows).t().contiguous() for values in self.by_row]
        return [table.data_ptr() for table in tables], 4 * batch, tables


def _of_each(values: Tensor, batch: int) -> Tensor:
    """[B, C] or [1, C] -> [B, C]."""
    return values if len(values) == batch else values.expand(batch, -1).contiguous()


def is_native(module: Any) -> bool:
    """Whether `module` is a layer with a kernel of this runtime."""
    return isinstance(module, QuantizedModule) and isinstance(module.kernel, NativeKernel)
