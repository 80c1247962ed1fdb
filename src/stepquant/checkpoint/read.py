"""Read a quantized pipeline: verify first, then build, then fill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stepquant.checkpoint.format import (
    QUANT_METHOD,
    WEIGHTS,
    Manifest,
    read_json,
    read_manifest,
    verify,
)
from stepquant.checkpoint.index import check_index
from stepquant.errors import StepquantError, first_line
from stepquant.models import DENOISERS, FAMILIES
from stepquant.nn.attention import QuantizedAttentionProcessor
from stepquant.nn.deploy import install_empty
from stepquant.runtime import prepare


def load_pipeline(folder: Path | str, backend: str = "auto") -> tuple[Any, Manifest]:
    """The diffusers pipeline in `folder`, its denoiser quantized and given the kernels of `backend`; and its manifest.

    Every file is checked against the manifest before it is opened; no code of the folder is executed.

    Raises:
        StepquantError: for a folder that is missing, foreign, damaged, or of a newer format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise StepquantError(f"{folder} is no folder: give one that `stepquant quantize` wrote.")
    manifest = read_manifest(folder)
    verify(folder, manifest)
    check_index(folder)
    if manifest.component not in DENOISERS:
        raise StepquantError(f"{folder} names {manifest.component!r} as its denoiser: the checkpoint is damaged.")
    denoiser = load_denoiser(folder / manifest.component)
    prepare(denoiser, backend)
    try:
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            torch_dtype=torch.float32,
            **{manifest.component: denoiser},
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise StepquantError(f"{folder} cannot be loaded as a diffusers pipeline: {first_line(error)}.") from None
    return pipeline, manifest


def load_denoiser(folder: Path) -> nn.Module:
    """The quantized denoiser in a component's folder, in float32, without kernels yet."""
    config = read_json(folder / "config.json")
    quantization = config.pop("quantization_config", None)
    name = config.get("_class_name")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise StepquantError(f"{folder}/config.json says nothing of stepquant: the checkpoint is damaged.")
    if name not in FAMILIES:
        raise StepquantError(f"{folder} holds a {name}: expected one of {', '.join(FAMILIES)}.")
    cls = getattr(diffusers, name)
    try:
        with init_empty_weights():
            model = cls.from_config(config)
    except Exception as error:  # a damaged configuration can fail in any way inside the model's constructor
        raise StepquantError(f"{folder}/config.json does not describe a {name}: {first_line(error)}.") from None
    install_empty(model, quantization.get("structure") or {}, device="meta")
    _fill(model, folder / WEIGHTS)
    model.register_to_config(quantization_config=quantization)
    # Layers check themselves when their kernels are built; tables of attentions are read at run time only.
    for module in model.modules():
        if isinstance(module, QuantizedAttentionProcessor):
            module.attention()
    return model.eval().requires_grad_(False)


def _fill(model: nn.Module, path: Path) -> None:
    """Load the weights of `path` into a model on the meta device; names, shapes and kinds must be exactly its own."""
    expected = model.state_dict()
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            if names != set(expected):
                odd = sorted(names ^ set(expected))[0]
                raise StepquantError(
                    f"{path}: tensor {odd!r} is missing or does not belong: the checkpoint is damaged."
                )
            tensors = {}
            for name, like in expected.items():
                if file.get_slice(name).get_shape() != list(like.shape):
                    raise StepquantError(f"{path}: tensor {name!r} has another shape than the model: damaged.")
                tensors[name] = _checked(path, name, file.get_tensor(name), like)
    except (OSError, SafetensorError) as error:
        raise StepquantError(f"{path} cannot be read ({first_line(error)}): the checkpoint is damaged.") from None
    model.load_state_dict(tensors, assign=True)


def _checked(path: Path, name: str, tensor: Tensor, like: Tensor) -> Tensor:
    if like.dtype.is_floating_point != tensor.dtype.is_floating_point:
        raise StepquantError(f"{path}: tensor {name!r} is {tensor.dtype}, expected {like.dtype}: damaged.")
    tensor = tensor.to(like.dtype)
    if like.dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
        raise StepquantError(f"{path}: tensor {name!r} holds a value that is no finite number: damaged.")
    return tensor
