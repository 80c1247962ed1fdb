"""Load the pipeline that a user names: a folder, a hub id, ``zoo:NAME``, or a quantized folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from stepquant import zoo
from stepquant.checkpoint import is_checkpoint, load_pipeline
from stepquant.checkpoint.bounds import check_index
from stepquant.checkpoint.format import MANIFEST
from stepquant.errors import StepquantError, first_line
from stepquant.layers.quantized import quantized_modules
from stepquant.models import denoiser_name, denoisers, primary_denoisers
from stepquant.runtime import Backend, prepare

ZOO_PREFIX = "zoo:"
SINGLE_FILE = ".safetensors"


def resolve_pipeline(
    model: str,
    backend: Backend = "auto",
    memory: str = "unpacked",
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    config: Path | str | None = None,
) -> Any:
    """Return the pipeline that `model` names: in full precision, or quantized with its kernels installed.

    Args:
        model: a diffusers folder, a folder written by stepquant, ``zoo:NAME``, the id of a model on the hub, or a
            ``.safetensors`` file that holds a whole model.
        backend, memory: runtime of a quantized model, and how it stores weights; see `stepquant.runtime.prepare`.
        dtype: dtype of the models of a full-precision pipeline.
        revision: branch, tag or commit of a model on the hub.
        variant: variant of the weight files, such as ``"fp16"``.
        config: folder of a pipeline that a single file is loaded with; by default diffusers finds it on the hub.

    Raises:
        StepquantError: if the model does not exist, is damaged, needs custom code, or has weights that are not finite.
    """
    if Path(model).suffix == SINGLE_FILE and Path(model).is_file():
        pipeline = load_single_file(Path(model), None if config is None else Path(config), dtype)
    else:
        if config is not None:
            raise StepquantError(f"config is {config}, but {model} is not a {SINGLE_FILE} file. Leave out `config`.")
        folder = locate(model, revision, variant)
        if is_checkpoint(folder):
            return load_pipeline(folder, backend, memory)[0]
        check_index(folder)
        with _one_sentence(model):
            # Weights in another format than safetensors are never read: they may contain code.
            pipeline = DiffusionPipeline.from_pretrained(
                folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True, variant=variant
            )
    primary_denoisers(pipeline)
    for denoiser in denoisers(pipeline).values():
        check_finite(denoiser, model)
        if quantized_modules(denoiser):  # saved by diffusers, which writes no manifest
            prepare(denoiser, backend, memory)
    return pipeline


@contextmanager
def _one_sentence(model: str) -> Iterator[None]:
    try:
        yield
    except StepquantError:
        raise
    except Exception as error:  # a damaged model makes diffusers raise exceptions of many classes
        raise StepquantError(f"pipeline {model} cannot be loaded: {first_line(error)}.") from None


def load_single_file(path: Path, config: Path | None, dtype: torch.dtype = torch.float32) -> Any:
    """Load a pipeline from one ``.safetensors`` file, such as those of Civitai.

    Args:
        config: folder of a pipeline with the same architecture; if the file holds the denoiser only, the other models
            are those of the folder. None lets diffusers find it on the hub.

    Raises:
        StepquantError: if the file cannot be loaded, or `config` is not a pipeline.
    """
    if config is not None:
        check_index(locate(str(config)))
    options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": config is not None}
    with _one_sentence(str(path)):
        if config is None:
            source = fetch_diffusers_config(load_single_file_checkpoint(str(path)))["pretrained_model_name_or_path"]
        else:
            source = str(config)
        name = DiffusionPipeline.load_config(source, local_files_only=config is not None)["_class_name"]
        try:
            return getattr(diffusers, name).from_single_file(str(path), config=source, **options)
        except Exception:  # of many classes, if a model is not in the file
            if config is None:
                raise
        pipeline = DiffusionPipeline.from_pretrained(source, use_safetensors=True, **options)
        component = denoiser_name(pipeline)
        denoiser: Any = type(getattr(pipeline, component))
        loaded = denoiser.from_single_file(str(path), config=source, subfolder=component, **options)
        pipeline.register_modules(**{component: loaded})
        return pipeline


def locate(model: str, revision: str | None = None, variant: str | None = None) -> Path:
    """Return the folder of a model, downloaded from the hub if needed; raises `StepquantError` if there is none."""
    if model.startswith(ZOO_PREFIX):
        return zoo.path(model.removeprefix(ZOO_PREFIX))
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise StepquantError(f"{model} is not a diffusers pipeline: the folder has no model_index.json.")
        return folder
    if folder.exists():
        raise StepquantError(
            f"{model} is a file; expected the folder of a diffusers pipeline, or a {SINGLE_FILE} file."
        )
    if model.count("/") != 1 or model.startswith((".", "~", "/")) or model.endswith("/"):
        raise StepquantError(
            f"there is no model {model!r}; expected a diffusers folder, a hub id such as owner/name, "
            f"or one of {', '.join(ZOO_PREFIX + name for name in zoo.names())}."
        )
    try:
        downloaded = Path(DiffusionPipeline.download(model, use_safetensors=True, revision=revision, variant=variant))
        with suppress(EntryNotFoundError):  # a full-precision model has none
            hf_hub_download(model, MANIFEST, revision=revision)  # diffusers fetches only what it knows
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
