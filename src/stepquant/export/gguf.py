"""GGUF export: the weights of a denoiser, for diffusers' `GGUFQuantizationConfig`, which computes in floating point.

GGUF stores linear weights in blocks of 32 input channels, with float16 scales. Codes are reused, so nothing is rounded
again but scales: up to 4 bits as Q4_1, ``w = scale * code + minimum`` with ``minimum = -scale * zero_point``; more as
Q8_0, ``w = scale * (code - zero_point)``. Activations are not quantized there. Other tensors are stored as float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepquant.core.qtensor import QTensor, expand_groups
from stepquant.export.network import import_optional
from stepquant.files import cannot_write
from stepquant.layers.install import made_by_quantization
from stepquant.layers.linear import QuantizedLinear
from stepquant.layers.quantized import quantized_modules

BLOCK = 32
"""Weights of one block."""


@torch.no_grad()
def export_gguf(denoiser: Any, path: Path) -> list[str]:
    """Write the weights of a quantized `denoiser` to a .gguf file, under diffusers' names.

    Returns:
        Quantized layers whose weights are stored in floating point: convolutions, layers with transforms, and those
        whose groups of input channels are not multiples of 32.

    Raises:
        StepquantError: if gguf is not installed or the file cannot be written.
    """
    gguf = import_optional("gguf", "gguf")
    made, layers, in_float = made_by_quantization(denoiser), quantized_modules(denoiser), []
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = gguf.GGUFWriter(draft, "diffusers")
        writer.add_name(type(denoiser).__name__)
        for name, tensor in denoiser.state_dict().items():
            if not name.startswith(made):
                writer.add_tensor(name, _float32(tensor))
        for name, module in layers.items():
            layer = module.layer()
            if isinstance(module, QuantizedLinear) and not layer.transforms and _fits(layer.weight):
                kind = gguf.GGMLQuantizationType.Q4_1 if layer.weight.bits <= 4 else gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(f"{name}.weight", blocks(layer.weight), raw_dtype=kind)
            else:
                in_float.append(name)
                writer.add_tensor(f"{name}.weight", _float32(module.in_torch_layout(layer.original_weight())))
            if layer.bias is not None:
                writer.add_tensor(f"{name}.bias", _float32(layer.bias))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        draft.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        draft.unlink(missing_ok=True)
    return in_float


def blocks(weight: QTensor) -> np.ndarray:
    """The bytes of a weight [out, in] as Q4_1 or Q8_0: uint8 [out, in / 32 * bytes of a block]."""
    out, channels = weight.codes.shape
    sizes = weight.grid.sizes(channels)
    scale, zero_point = (
        expand_groups(part[0], sizes)[::BLOCK].t() for part in (weight.grid.scale.half(), weight.grid.zero_point)
    )
    parts = [_bytes(scale)]
    if weight.bits <= 4:
        low, high = weight.codes.reshape(out, -1, 2, BLOCK // 2).unbind(2)
        parts += [_bytes((-scale.float() * zero_point).half()), (low | high << 4).numpy()]
    else:
        parts.append(weight.integers().reshape(out, -1, BLOCK).numpy().view(np.uint8))
    return np.concatenate(parts, axis=-1).reshape(out, -1)


def _bytes(halves: Tensor) -> np.ndarray:
    """float16 [out, blocks] -> uint8 [out, blocks, 2]."""
    return np.ascontiguousarray(halves.cpu().numpy()[..., None]).view(np.uint8)


def _fits(weight: QTensor) -> bool:
    return all(size % BLOCK == 0 for size in weight.grid.sizes(weight.codes.shape[1]))


def _float32(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy())
