"""Arguments of a call in a safetensors file, for another process: a tree of tensors, arrays, images, plain values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree as pytree

from stepquant.calibration.buckets import Shared, decoded, encoded


def save_values(value: Any, path: Path) -> None:
    """Write a tree to `path`; raises `StepquantError` for an entry of another kind (see `encoded`)."""
    tensors: dict[str, Tensor] = {}

    def keep(part: Any) -> Any:
        match part:
            case Tensor():
                kind, tensor = "tensor", part.detach().cpu()
            case np.ndarray():
                kind, tensor = "array", torch.from_numpy(part)
            case Image.Image():
                kind, tensor = f"image {part.mode}", torch.from_numpy(np.array(part))
            case _:
                return part.item() if isinstance(part, np.generic) else part
        key = f"{len(tensors)} {kind}"
        tensors[key] = tensor.clone(memory_format=torch.contiguous_format)
        return Shared(key)

    template = pytree.tree_map(keep, value)
    save_file(tensors, path, metadata={"template": json.dumps(encoded(template))})


def load_values(path: Path) -> Any:
    """Read what `save_values` wrote, on the CPU."""
    with safe_open(path, framework="pt") as file:

        def restore(part: Any) -> Any:
            if not isinstance(part, Shared):
                return part
            tensor = file.get_tensor(part.key)
            kind, *mode = part.key.split()[1:]
            if kind == "tensor":
                return tensor
            return Image.fromarray(tensor.numpy(), *mode) if kind == "image" else tensor.numpy()

        return pytree.tree_map(restore, decoded(json.loads(file.metadata()["template"])))
