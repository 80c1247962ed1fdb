"""Save a quantized pipeline to a folder or the hub, and load it again."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi

from stepquant.checkpoint import load_pipeline, save_pipeline
from stepquant.checkpoint.write import ORIGINAL
from stepquant.errors import StepquantError
from stepquant.models.denoisers import quantized_denoisers
from stepquant.runtime import Backend


def save(pipeline: Any, folder: Path | str, *, overwrite: bool = False) -> None:
    """Write a pipeline whose denoiser is quantized, with its manifest and a model card.

    ``pipeline.save_pretrained(folder)`` does the same.

    Raises:
        StepquantError: if the pipeline is not quantized, or the folder exists and may not be replaced.
    """
    components = list(quantized_denoisers(pipeline))
    if not components:
        raise StepquantError("the pipeline is not quantized by stepquant. Quantize it first.")
    save_pipeline(pipeline, components, provenance_of(getattr(pipeline, components[0])), folder, overwrite=overwrite)


def provenance_of(denoiser: Any) -> dict[str, Any]:
    """Provenance of a quantized denoiser: recipe, arguments, spec, calibration, seed, versions."""
    return dict(denoiser.config.get("quantization_config") or {}).get("provenance") or {}


def load(
    folder: Path | str,
    *,
    backend: Backend = "auto",
    memory: str = "unpacked",
    pipeline_class: type[DiffusionPipeline] | None = None,
) -> Any:
    """Load the quantized pipeline in `folder`, verified and ready to run.

    Args:
        backend: the runtime, one of ``stepquant.runtime.BACKENDS`` or a custom function (``KernelFactory``).
        memory: ``"unpacked"``, or ``"packed"``: weights of up to 4 bits stay two to a byte. Results are the same.
        pipeline_class: class of the pipeline, if it is not one of diffusers.

    ``DiffusionPipeline.from_pretrained`` loads folders and models of the hub; it verifies the quantized component.

    Raises:
        StepquantError: if the folder is missing, not a checkpoint, damaged, or of a newer format.
    """
    return load_pipeline(folder, backend, memory, pipeline_class)[0]


def extend_pipelines() -> None:
    """Make `save_pretrained` and `push_to_hub` of diffusers pipelines support quantized pipelines.

    This holds for the class, so that it does not depend on how a pipeline was loaded, copied or put together. A
    pipeline that is not quantized keeps diffusers' own methods. Doing it again changes nothing.
    """
    for name, extended in (("save_pretrained", _save_pretrained), ("push_to_hub", push_to_hub)):
        if not hasattr(getattr(DiffusionPipeline, name), ORIGINAL):
            setattr(DiffusionPipeline, name, _extended(getattr(DiffusionPipeline, name), extended))


def _extended(original: Callable[..., Any], extended: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (extended if quantized_denoisers(self) else original)(self, *args, **kwargs)

    setattr(method, ORIGINAL, original)
    return method


def _save_pretrained(
    pipeline: Any,
    save_directory: Path | str,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
    *,
    overwrite: bool = False,
    **hub: Any,
) -> None:
    """`save` with the signature of diffusers."""
    if not safe_serialization or variant is not None or hub:
        given = sorted(hub) or (f"variant={variant!r}" if variant else "safe_serialization=False")
        raise StepquantError(
            f"a quantized pipeline cannot be saved with {given}: it is one safetensors file without variants; "
            "its push_to_hub uploads it."
        )
    save(pipeline, save_directory, overwrite=overwrite)


def push_to_hub(
    pipeline: Any, repo_id: str, *, private: bool | None = None, token: str | None = None, **commit: Any
) -> str:
    """Upload a quantized pipeline with its model card to the hub; returns the URL of the commit.

    Args:
        private: whether a new repository is private.
        commit: ``commit_message``, ``create_pr`` and other arguments of ``HfApi.upload_folder``.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="stepquant-") as temporary:
        folder = Path(temporary) / "model"
        save(pipeline, folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = {"commit_message": f"Upload {type(pipeline).__name__}"} | commit
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **commit))
