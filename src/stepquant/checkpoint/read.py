"""Read a quantized pipeline: verify first, then build, then fill."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stepquant.checkpoint.bounds import bounded_by, check_configurations, check_index, check_numbers
from stepquant.checkpoint.format import (
    DIGEST,
    QUANT_METHOD,
    WEIGHTS,
    Manifest,
    check_link,
    is_checkpoint,
    read_json,
    read_manifest,
    verify,
)
from stepquant.checkpoint.upgrade import expect_version, upgrade_config, upgrade_model
from stepquant.errors import StepquantError, first_line
from stepquant.files import tensors_digest
from stepquant.layers.attention import QuantizedAttentionProcessor
from stepquant.layers.correction import OutputCorrection
from stepquant.layers.install import install_empty
from stepquant.pipelines.corrected_scheduler import correct_sampler
from stepquant.runtime import Backend, prepare

PIECE = 64
"""Tensors read before the file is closed and reopened, which releases the memory of what was read."""


def load_pipeline(
    folder: Path | str,
    backend: Backend = "auto",
    memory: str = "unpacked",
    pipeline_class: type[diffusers.DiffusionPipeline] | None = None,
) -> tuple[Any, Manifest]:
    """Load the pipeline in `folder`, with the kernels of `backend`; returns it and its manifest.

    Every file is checked against the manifest before it is opened; no code of the folder is executed.

    Args:
        pipeline_class: class of the pipeline, if it is not one of diffusers.

    Raises:
        StepquantError: if the folder is missing, not a checkpoint, damaged, or of a newer format.
    """
    given, folder = folder, Path(folder)
    if not folder.is_dir():
        raise StepquantError(
            f"{given} is not a folder; expected one that `stepquant quantize` wrote. A model on the hub is loaded by "
            "DiffusionPipeline.from_pretrained of diffusers."
        )
    manifest = read_manifest(folder)
    verify(folder, manifest)
    check_index(folder, pipeline_class)
    check_configurations(folder)
    quantized = {name: load_denoiser(folder / name) for name in _components(folder, manifest)}
    for denoiser in quantized.values():
        prepare(denoiser, backend, memory)
    try:
        with bounded_by(sorted(folder.glob("*/*.safetensors"))):
            pipeline = (pipeline_class or diffusers.DiffusionPipeline).from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                torch_dtype=torch.float32,
                **quantized,
            )
    except StepquantError:
        raise
    except Exception as error:  # other libraries read the other components, and can fail in any way
        raise StepquantError(f"{folder} cannot be loaded as a diffusers pipeline: {first_line(error)}.") from None
    for denoiser in quantized.values():
        correct_sampler(pipeline, denoiser)
    return pipeline, manifest


def _components(folder: Path, manifest: Manifest) -> list[str]:
    """Return the names of the quantized denoisers."""
    names = list(dict.fromkeys([manifest.component, *manifest.provenance.get("components", {})]))
    for name in names:
        if f"{name}/{WEIGHTS}" not in manifest.files:
            raise StepquantError(f"{folder} names {name!r} as its denoiser: the checkpoint is damaged.")
    return names


def load_denoiser(folder: Path) -> nn.Module:
    """Load the quantized denoiser in a component's folder, in float32 and without kernels."""
    config = read_json(folder / "config.json")
    quantization = config.pop("quantization_config", None)
    name = config.get("_class_name")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        raise StepquantError(f"{folder}/config.json has no stepquant configuration. The checkpoint is damaged.")
    cls: Any = getattr(diffusers, str(name), None)
    if not inspect.isclass(cls) or not issubclass(cls, diffusers.ModelMixin):
        raise StepquantError(f"{folder} holds a {name}: expected a model of diffusers {diffusers.__version__}.")
    check_numbers(folder / "config.json", config)
    quantization, version = upgrade_config(quantization, f"{folder}/config.json")
    try:
        with bounded_by([folder / WEIGHTS]), init_empty_weights():
            model: Any = cls.from_config(config)  # type: ignore[attr-defined]
    except StepquantError:
        raise
    except Exception as error:  # a damaged configuration can fail in any way inside the model's constructor
        raise StepquantError(f"{folder}/config.json does not describe a {name}: {first_line(error)}.") from None
    install_empty(model, quantization.get("structure") or {}, device="meta")
    expect_version(model, version)
    _fill(model, folder / WEIGHTS)
    upgrade_model(model, version)
    model.register_to_config(quantization_config=quantization)
    check_tables(model)
    return model.eval().requires_grad_(False)


def verify_component(files: list[Path]) -> None:
    """Verify the weight files of one quantized component before their tensors are used.

    They are checked against the manifest of the pipeline's folder, else against the digest in the file, if any.

    Raises:
        StepquantError: if a file is not a safetensors file, is a link to elsewhere, or is damaged.
    """
    for path in files:
        if path.suffix != ".safetensors":
            raise StepquantError(f"{path} is not a safetensors file; expected only those in a quantized component.")
    folder = files[0].parent
    root = folder.parent
    if is_checkpoint(root):
        manifest = read_manifest(root)
        if any(name.startswith(f"{folder.name}/") for name in manifest.files):
            verify(root, manifest, folder.name)
            return
    for path in files:
        check_link(path, root)
        try:
            with safe_open(path, "pt") as file:
                recorded = (file.metadata() or {}).get(DIGEST)
                tensors = {name: file.get_tensor(name) for name in file.keys()} if recorded else {}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise StepquantError(f"{path} cannot be read ({first_line(error)}): the checkpoint is damaged.") from None
        if recorded and tensors_digest(tensors) != recorded:
            raise StepquantError(f"{path} does not match its own digest: the checkpoint is damaged, copy it again.")


def check_tables(model: nn.Module) -> None:
    """Check the tables of attentions and of the output correction; those of layers are checked with their kernels."""
    for module in model.modules():
        if isinstance(module, QuantizedAttentionProcessor):
            module.attention()
        elif isinstance(module, OutputCorrection):
            module.correction()


def _fill(model: nn.Module, path: Path) -> None:
    """Load the weights of `path` into a model on the meta device; names, shapes and dtypes must match."""
    expected = model.state_dict()
    try:
        with safe_open(path, "pt") as file:
            check_names(path, set(file.keys()), set(expected))
        names, tensors = list(expected), {}
        for start in range(0, len(names), PIECE):
            with safe_open(path, "pt") as file:
                for name in names[start : start + PIECE]:
                    tensors[name] = check_tensor(path, name, file.get_tensor(name), expected[name]).clone()
    except (OSError, SafetensorError) as error:
        raise StepquantError(f"{path} cannot be read ({first_line(error)}): the checkpoint is damaged.") from None
    model.load_state_dict(tensors, assign=True)


def check_names(path: Path, names: set[str], expected: set[str]) -> None:
    """Raise `StepquantError` unless the tensors of a file are exactly those that the model expects."""
    if names != expected:
        odd = sorted(names ^ expected)[0]
        raise StepquantError(f"{path}: tensor {odd!r} is missing or does not belong: the checkpoint is damaged.")


def check_tensor(path: Path, name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """Convert `tensor` to the dtype of `like`; raises `StepquantError` for a wrong shape, kind or value."""
    if tensor.shape != like.shape:
        raise StepquantError(f"{path}: tensor {name!r} has another shape than the model. The checkpoint is damaged.")
    # Floats may be widened; integers must have the exact dtype.
    is_float = like.dtype.is_floating_point and tensor.dtype.is_floating_point
    if not is_float and tensor.dtype != like.dtype:
        raise StepquantError(
            f"{path}: tensor {name!r} is {tensor.dtype}, expected {like.dtype}. The checkpoint is damaged."
        )
    tensor = tensor.to(like.dtype)
    if like.dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
        raise StepquantError(f"{path}: tensor {name!r} has a value that is not finite. The checkpoint is damaged.")
    return tensor
