"""Read format version 1: rewrite configurations, and load tensors under their former names and shapes.

Version 2 has three-dimensional scales and zero points, and an ordered list of transforms per layer. Version 1 had the
smoothing factor as the tensor ``input_balance``, weight grids [G, out], input grids [R, G] and operand grids [R, 1].
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from stepquant.checkpoint.format import FORMAT_VERSION, check_version
from stepquant.core.transforms import Smoothing
from stepquant.errors import StepquantError
from stepquant.layers.attention import QuantizedAttentionProcessor
from stepquant.layers.buffers import TransformBuffers
from stepquant.layers.quantized import QuantizedModule

SPEC_NAMES = {"balance": "smoothing", "exceptions": "overrides"}
"""Fields of a spec in version 1 -> current names."""

SMOOTHING = "input_balance"
"""Name of the smoothing factor in version 1."""


class _LayerFormat1(BaseModel):
    """A layer's format as version 1 stored it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    weight_bits: int
    weight_groups: list[int]
    activation_bits: int | None = None
    activation_groups: list[int] = []
    activation_rows: int = 1
    balanced: bool = False

    def upgraded(self) -> dict[str, Any]:
        grid = {"bits": self.activation_bits, "groups": self.activation_groups, "rows": self.activation_rows}
        return {
            "weight": {"bits": self.weight_bits, "groups": self.weight_groups, "rows": 1},
            "input": None if self.activation_bits is None else grid,
            "transforms": [{"kind": "smoothing"}] if self.balanced else [],
        }


def upgrade_config(config: dict[str, Any], what: str) -> tuple[dict[str, Any], int]:
    """Convert the `quantization_config` of a component to the current version; also returns its stored version.

    Args:
        what: source of the configuration, for messages.

    Raises:
        StepquantError: if its version is unknown, or it is malformed.
    """
    version = check_version(config.get("format_version"), what)
    if version == FORMAT_VERSION:
        return config, version
    try:
        structure = dict(config.get("structure") or {})
        layers = structure.get("layers") or {}
        structure["layers"] = {name: _LayerFormat1.model_validate(layer).upgraded() for name, layer in layers.items()}
        upgraded = config | {"format_version": FORMAT_VERSION, "structure": structure, "spec": _spec(config["spec"])}
        provenance = config.get("provenance")
        if provenance is not None and "spec" in provenance:
            upgraded["provenance"] = provenance | {"spec": _spec(provenance["spec"])}
    except (ValidationError, AttributeError, KeyError, TypeError, ValueError):
        raise StepquantError(
            f"{what} does not describe a model of format version 1. The checkpoint is damaged; quantize the model "
            "again."
        ) from None
    return upgraded, version


def expect_version(model: nn.Module, version: int) -> None:
    """Give an empty quantized model the tensors that a file of `version` has."""
    if version == FORMAT_VERSION:
        return
    for module, name, dim in _grids(model):
        setattr(module, name, getattr(module, name).squeeze(dim))
    for module in model.modules():
        if isinstance(module, QuantizedModule) and len(module.transforms):
            module.register_buffer(SMOOTHING, module.transforms[0].get_buffer("factor"))
            module.transforms = nn.ModuleList()


def upgrade_model(model: nn.Module, version: int) -> None:
    """Undo `expect_version` on the filled model."""
    if version == FORMAT_VERSION:
        return
    for module, name, dim in _grids(model):
        setattr(module, name, getattr(module, name).unsqueeze(dim))
    for module in model.modules():
        if isinstance(module, QuantizedModule) and hasattr(module, SMOOTHING):
            factor: Tensor = getattr(module, SMOOTHING)
            delattr(module, SMOOTHING)
            module.transforms = nn.ModuleList([TransformBuffers(Smoothing(factor))])


def _grids(model: nn.Module) -> list[tuple[nn.Module, str, int]]:
    """Tensors of grids: module, name, and the dimension that version 1 did not have."""
    found: list[tuple[nn.Module, str, int]] = []
    for module in model.modules():
        if isinstance(module, QuantizedModule | QuantizedAttentionProcessor):
            for name, _ in module.named_buffers(recurse=False):
                if name.endswith(("_scale", "_zero_point")):
                    found.append((module, name, 0 if name.startswith("weight_") else 2))
    return found


def _spec(spec: dict[str, Any]) -> dict[str, Any]:
    return {SPEC_NAMES.get(name, name): value for name, value in spec.items()}
