"""Write a quantized pipeline atomically."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from stepquant.checkpoint.card import CARD, model_card
from stepquant.checkpoint.format import FORMAT_VERSION, MANIFEST, WEIGHTS, Manifest, is_checkpoint, record
from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.files import cannot_write, draft_path, remove, remove_orphans, sync, uninterrupted
from stepquant.layers.install import made_by_quantization

ORIGINAL = "stepquant_original"
"""Attribute of an extended method of diffusers (`stepquant.saving.extend_pipelines`): the method as it was."""


def save_pipeline(
    pipeline: Any, components: Sequence[str], provenance: dict[str, Any], out: Path | str, *, overwrite: bool = False
) -> Manifest:
    """Write `pipeline`, some of whose denoisers are quantized, to the folder `out`; returns the manifest written.

    The folder appears under its name only when it is complete; one that it replaces is removed after that. An
    interruption (SIGINT) waits until then. Of several processes the main one writes, and the others wait for it.

    Args:
        components: names of the quantized denoisers.
        provenance: of the first of them; those of all are in their configurations.

    Raises:
        StepquantError: if `out` exists and may not be replaced, or cannot be written.
    """
    ranks = Ranks.current()
    manifest = None
    if ranks.is_main:
        with uninterrupted():
            manifest = _save(pipeline, components, provenance, Path(out), overwrite)
    return ranks.broadcast(manifest)


def _save(pipeline: Any, components: Sequence[str], provenance: dict[str, Any], out: Path, overwrite: bool) -> Manifest:
    draft = draft_path(out)
    previous = out.with_name(f".{out.name}.previous")
    if previous.exists() and not out.exists():
        previous.rename(out)  # a process was killed between two renames
    check_out(out, overwrite=overwrite)
    try:
        draft.mkdir(parents=True)
        remove_orphans(out)
        save = type(pipeline).save_pretrained
        getattr(save, ORIGINAL, save)(pipeline, draft, safe_serialization=True)
        for path in (path for name in components for path in (draft / name).glob("*.safetensors*")):
            path.unlink()
        _complete(pipeline, draft)
        _forget_origin(draft)
        _load_in_float32(draft)
        for name in components:
            denoiser = getattr(pipeline, name)
            tensors = narrow_tensors(denoiser.state_dict(), made_by_quantization(denoiser))
            # A single entry of metadata: safetensors writes several in an order that changes from run to run.
            save_file(tensors, draft / name / WEIGHTS, metadata={"format": "pt"})
        for path in draft.rglob("*.safetensors"):  # safetensors makes them readable by their owner only
            shutil.copymode(draft / "model_index.json", path)
        (draft / CARD).unlink(missing_ok=True)
        files = {
            path.relative_to(draft).as_posix(): record(path) for path in sorted(draft.rglob("*")) if path.is_file()
        }
        stored = {name: files[f"{name}/{WEIGHTS}"].bytes for name in components}
        (draft / CARD).write_text(model_card(pipeline, stored, provenance), encoding="utf-8")
        manifest = Manifest(
            format_version=FORMAT_VERSION, component=components[0], provenance=provenance, files=files
        ).sealed()
        (draft / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        for path in draft.rglob("*"):
            sync(path)
        sync(draft)
        if out.exists():
            shutil.rmtree(previous, ignore_errors=True)
            out.rename(previous)
        draft.rename(out)
        sync(out.parent)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if previous.exists() and not out.exists():
            previous.rename(out)
        raise cannot_write(out, error) from None
    finally:
        remove(draft)
    return manifest


def check_out(out: Path, *, overwrite: bool = False) -> None:
    """Raise `StepquantError` if `out` is inside a checkpoint, or exists and is not a model to be overwritten."""
    for parent in out.resolve().parents:
        if is_checkpoint(parent):
            raise StepquantError(
                f"{out} lies inside the checkpoint {parent}, which must stay as it is. Choose another folder."
            )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise StepquantError(f"{out} exists and is not a folder. Choose another name for the output.")
    if not out.exists() or not any(out.iterdir()):
        return
    if not is_checkpoint(out) and not (out / "model_index.json").is_file():
        raise StepquantError(
            f"{out} does not contain a model, and overwrite=True replaces only models. Choose another folder, or empty "
            "this one."
        )
    if not overwrite:
        whose = (
            "already contains a quantized model" if is_checkpoint(out) else "exists and was not written by stepquant"
        )
        raise StepquantError(f"{out} {whose}. Choose another folder, or give overwrite=True to replace it.")


def _complete(pipeline: Any, folder: Path) -> None:
    """Add the names of classes, which diffusers reads but does not write, and a model's example prompts."""
    labels = getattr(pipeline, "labels", None)
    if labels:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        names: dict[int, list[str]] = {}
        for name, label in labels.items():
            names.setdefault(label, []).append(name)
        index["id2label"] = {str(label): ", ".join(names[label]) for label in sorted(names)}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    prompts = Path(str(pipeline.config.get("_name_or_path", ""))) / "prompts.txt"
    if prompts.is_file():
        shutil.copyfile(prompts, folder / "prompts.txt")


def _forget_origin(folder: Path) -> None:
    """Remove the local path that a model was loaded from from its configurations."""
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _load_in_float32(folder: Path) -> None:
    """Make all components load in float32 by default.

    diffusers loads in float32, but transformers in the dtype of its configuration, and a pipeline with a text encoder
    in bfloat16 and a denoiser in float32 does not run.
    """
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("dtype") in ("bfloat16", "float16"):
            path.write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")


def narrow_tensors(state: Mapping[str, Tensor], made: tuple[str, ...]) -> dict[str, Tensor]:
    """Store floats in fp16 where that is lossless, except tensors that quantization created.

    Args:
        made: name prefixes of those tensors (`stepquant.layers.install.made_by_quantization`).
    """
    narrowed = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        keep = name.startswith(made) or tensor.dtype != torch.float32
        narrowed[name] = tensor if keep else narrow(tensor)
    return narrowed


def narrow(tensor: Tensor) -> Tensor:
    """Convert a float32 tensor to fp16 if that is lossless."""
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor
