"""Write a quantized pipeline to a folder or the hub, and load it again."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from stepquant.checkpoint import load_pipeline, save_pipeline
from stepquant.errors import StepquantError
from stepquant.layers.quantized import quantized_modules
from stepquant.models import denoiser_name
from stepquant.runtime import Backend


def save(pipeline: Any, folder: Path | str, *, overwrite: bool = False) -> None:
    """Write a pipeline whose denoiser is quantized, with its manifest and a model card.

    The same as ``save_pretrained`` of a pipeline that `quantize` or `load` returned. One that diffusers loaded has
    diffusers' own ``save_pretrained``, which writes a folder that loads but has neither manifest nor card.

    Raises:
        StepquantError: if the pipeline is not quantized, or the folder exists and may not be replaced.
    """
    component = denoiser_name(pipeline)
    denoiser = getattr(pipeline, component)
    if not quantized_modules(denoiser):
        raise StepquantError("the pipeline is not quantized by stepquant: quantize it first.")
    save_pipeline(pipeline, component, provenance_of(denoiser), folder, overwrite=overwrite)


def provenance_of(denoiser: Any) -> dict[str, Any]:
    """Where a quantized denoiser comes from: recipe, arguments, spec, calibration, seed, versions."""
    return dict(denoiser.config.get("quantization_config") or {}).get("provenance") or {}


def load(folder: Path | str, *, backend: Backend = "auto", memory: str = "unpacked") -> Any:
    """The quantized pipeline in `folder`, every file verified, and ready to run.

    Args:
        backend: the runtime, one of ``stepquant.runtime.BACKENDS`` or a function of your own (``KernelFactory``).
        memory: ``"unpacked"``, or ``"packed"``: weights of up to 4 bits stay two to a byte. Results are the same.

    ``DiffusionPipeline.from_pretrained(folder)`` loads it as well, and verifies the quantized component. It loads from
    the hub, too, by a model's id; `load` takes folders only.

    Raises:
        StepquantError: for what is no folder, or one that is foreign, damaged, or of a newer format.
    """
    return bound(load_pipeline(folder, backend, memory)[0])


def bound(pipeline: Any) -> Any:
    """Let a pipeline's own methods write all that belongs to a quantized one."""
    pipeline.save_pretrained = functools.partial(_save_pretrained, pipeline)
    pipeline.push_to_hub = functools.partial(push_to_hub, pipeline)
    return pipeline


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
    """`save` in the signature of diffusers."""
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
    """Upload a quantized pipeline with its model card to the hub; returns the address of the commit.

    Args:
        private: whether the repository is private, if it does not exist yet.
        commit: ``commit_message``, ``create_pr`` and whatever else ``HfApi.upload_folder`` takes.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="stepquant-") as temporary:
        folder = Path(temporary) / "model"
        save(pipeline, folder)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = {"commit_message": f"Upload {type(pipeline).__name__}"} | commit
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **commit))
