"""Load the pipeline that a user names: a folder, a hub id, ``zoo:NAME``, or a quantized folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download, list_repo_files
from torch import nn

from stepquant import zoo
from stepquant.checkpoint import is_checkpoint, load_pipeline
from stepquant.checkpoint.bounds import check_index
from stepquant.checkpoint.format import MANIFEST
from stepquant.errors import StepquantError, first_line
from stepquant.layers.quantized import quantized_modules
from stepquant.models import denoiser_name
from stepquant.runtime import Backend, prepare

ZOO_PREFIX = "zoo:"


def resolve_pipeline(
    model: str, backend: Backend = "auto", memory: str = "unpacked", *, dtype: torch.dtype = torch.float32
) -> Any:
    """Return the pipeline that `model` names: in full precision, or quantized with its kernels installed.

    Args:
        model: a diffusers folder, a folder written by stepquant, ``zoo:NAME``, or the id of a model on the hub.
        backend, memory: runtime of a quantized model, and how it stores weights; see `stepquant.runtime.prepare`.
        dtype: dtype of the models of a full-precision pipeline.

    Raises:
        StepquantError: if the model does not exist, is damaged, needs custom code, or has weights that are not finite.
    """
    folder = locate(model)
    if is_checkpoint(folder):
        return load_pipeline(folder, backend, memory)[0]
    check_index(folder)
    try:
        # Weights in another format than safetensors are never read: they may contain code.
        pipeline = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except StepquantError:
        raise
    except Exception as error:  # a damaged folder makes from_pretrained raise exceptions of many classes
        raise StepquantError(f"pipeline {model} cannot be loaded: {first_line(error)}.") from None
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    check_finite(denoiser, model)
    if quantized_modules(denoiser):  # saved by diffusers, which writes no manifest
        prepare(denoiser, backend, memory)
    return pipeline


def locate(model: str) -> Path:
    """Return the folder of a model, downloaded from the hub if needed; raises `StepquantError` if there is none."""
    if model.startswith(ZOO_PREFIX):
        return zoo.path(model.removeprefix(ZOO_PREFIX))
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise StepquantError(f"{model} is not a diffusers pipeline: the folder has no model_index.json.")
        return folder
    if folder.exists():
        raise StepquantError(f"{model} is a file; expected the folder of a diffusers pipeline.")
    if model.count("/") != 1 or model.startswith((".", "~", "/")) or model.endswith("/"):
        raise StepquantError(
            f"there is no model {model!r}; expected a diffusers folder, a hub id such as owner/name, "
            f"or one of {', '.join(ZOO_PREFIX + name for name in zoo.names())}."
        )
    try:
        downloaded = Path(DiffusionPipeline.download(model, use_safetensors=True))
        if MANIFEST in list_repo_files(model):  # diffusers fetches only what it knows
            hf_hub_download(model, MANIFEST)
        return downloaded
    except Exception as error:  # network, hub and file errors come in many classes
        raise StepquantError(
            f"{model!r} is not a local folder, and cannot be downloaded from the hub: {first_line(error)}."
        ) from None


def check_finite(denoiser: nn.Module, model: str) -> None:
    """Raise `StepquantError` for the first weight of the denoiser that contains NaN or infinity."""
    for name, tensor in denoiser.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise StepquantError(f"weight {name} of {model} contains NaN or infinity. Download the model again.")
