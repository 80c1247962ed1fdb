"""Options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from stepquant.errors import StepquantError


class FloatType(StrEnum):
    """Floating-point types of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    @property
    def torch(self) -> Any:
        """The type in torch."""
        import torch

        return getattr(torch, self.value)


class EffortName(StrEnum):
    """Efforts of `stepquant.recipes.EFFORTS`."""

    quick = "quick"
    standard = "standard"
    thorough = "thorough"


class ActivationName(StrEnum):
    """Values of `stepquant.QuantSpec.activations`."""

    static = "static"
    dynamic = "dynamic"


class LowQualityAction(StrEnum):
    """Values of `on_low_quality` of `stepquant.quantize`."""

    warn = "warn"
    raise_bits = "raise-bits"
    error = "error"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A diffusers folder, a hub id, a .safetensors file, or zoo:NAME.")
]
AnyModel = Annotated[str, typer.Argument(metavar="DIR_OR_MODEL", help="A quantized folder, or any MODEL.")]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder written by stepquant quantize.")]
Against = Annotated[
    str | None, typer.Option(metavar="MODEL", help="The full-precision model; default: the one the folder names.")
]
Out = Annotated[Path, typer.Option(help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the model that the folder holds.")]
Bits = Annotated[str, typer.Option(help="Bits of weights and activations, such as w8a8, w4a8, w4a16.")]
Override = Annotated[
    list[str] | None, typer.Option(metavar="REGEX=BITS", help="Other bits for some layers; can be repeated.")
]
ExactTime = Annotated[
    bool, typer.Option("--exact-time", help="Keep layers that depend on the timestep alone in floating point.")
]
Smoothing = Annotated[
    bool | None,
    typer.Option(
        "--smoothing/--no-smoothing", help="Move outlier channels into the weights; default: depends on the recipe."
    ),
]
Activations = Annotated[
    ActivationName,
    typer.Option(help="Ranges of activations: from calibration, or those of each token or pixel when it is quantized."),
]
GroupSize = Annotated[
    int | None,
    typer.Option(metavar="CHANNELS", help="Input channels that share a scale, such as 64; default: all of a layer's."),
]
StepBits = Annotated[
    list[str] | None,
    typer.Option(
        metavar="START-STOP[:REGEX]=BITS",
        help="Other activation bits in a part of the steps, from 0, the first, to 1: 0.8-1=8; can be repeated.",
    ),
]
ActivationBudget = Annotated[
    float | None,
    typer.Option(
        metavar="BITS",
        help="Mean activation bits, such as 4.5: the steps and layers that change the image most have 8.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(metavar="BITS", help="Mean bits per weight, such as 4.5bits; the most sensitive layers keep 8 bits."),
]
Correct = Annotated[
    bool, typer.Option("--correct", help="Correct, per step, the error that is proportional to the output (PTQD).")
]
Also = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=BITS", help="Round another model's weights, such as vae=w8a16; can be repeated."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="A hyperparameter of the recipe; can be repeated."),
]
Effort = Annotated[EffortName, typer.Option(help="Scales calibration samples, their steps and all iterations.")]
Samples = Annotated[int | None, typer.Option(help="Calibration samples; default: depends on --effort.", min=1)]
CalibrationSteps = Annotated[
    int | None, typer.Option("--steps", help="Denoising steps while calibrating; default: depends on --effort.", min=1)
]
Trajectories = Annotated[
    int | None, typer.Option(help="Images generated for calibration; default: as many as --samples, up to 64.", min=1)
]
Times = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the duration of each stage to this file.")]
Check = Annotated[
    bool, typer.Option("--check/--no-check", help="Compare a few images that nothing was fitted to, at the end.")
]
LowQuality = Annotated[
    LowQualityAction,
    typer.Option(help="If they are below the floor of these bits: warn, raise the bits of some layers, or fail."),
]
Count = Annotated[int, typer.Option(help="Number of images.", min=1)]
Steps = Annotated[int, typer.Option(help="Denoising steps.", min=1)]
Seed = Annotated[int, typer.Option(help="Seed of all random numbers.", min=0)]
Guidance = Annotated[float | None, typer.Option(help="Scale of classifier-free guidance; default: the pipeline's.")]
Prompts = Annotated[Path | None, typer.Option(help="File with one prompt per line; default: the model's own prompts.")]
Inputs = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="JSON file of arguments of the pipeline's call: values, paths of images and frames.",
    ),
]
Component = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=BITS",
        help="Quantize this denoiser (transformer_2=w4a8), in place of --bits; can be repeated.",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Variant = Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")]
Config = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Pipeline folder to load a single .safetensors file with; default: the hub's."),
]
Backend = Annotated[
    str, typer.Option(help="Runtime of a quantized model: auto, native, onednn, cuda, reference, or path.py:function.")
]
Memory = Annotated[
    str,
    typer.Option(help="How weights of up to 4 bits are held: unpacked, or packed (half the memory, 14 % slower)."),
]
Device = Annotated[
    str | None,
    typer.Option(help="Compute there, such as cuda, one block at a time: the model need not fit; default: the CPU."),
]
DType = Annotated[
    FloatType, typer.Option("--dtype", help="Type of the full-precision weights; 16 bits take half the memory.")
]
Size = Annotated[int | None, typer.Option(help="Height and width in pixels; default: the model's own.", min=1)]
Json = Annotated[Path | None, typer.Option(help="Write the figures to this file.")]


def pairs_from(options: Sequence[str] | None, form: str) -> dict[str, str]:
    """``["mid_block=w8a8"]`` -> ``{"mid_block": "w8a8"}``; the name may contain ``=``.

    Args:
        form: the expected form, for the error message.
    """
    pairs = {}
    for text in options or ():
        name, equals, value = text.rpartition("=")
        if not equals or not name:
            raise StepquantError(f"{text!r} cannot be parsed; expected {form}.")
        pairs[name] = value
    return pairs


def settings_from(options: Sequence[str] | None, settings: Any) -> dict[str, Any]:
    """``["iterations=60"]`` -> ``{"iterations": 60}``, in the types of the fields of `settings`.

    Raises:
        StepquantError: for a name that is not a field, or a value that the field does not take.
    """
    values = {}
    for name, text in pairs_from(options, "NAME=VALUE, such as iterations=60").items():
        field = settings.model_fields.get(name)
        values[name] = text if field is not None and field.annotation is str else _json_or_text(text)
    checked = settings(**values)
    return {name: getattr(checked, name) for name in values}


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def prompts_from(path: Path | None) -> list[str] | None:
    """The prompts in a file, None for no file."""
    from stepquant.pipelines.request import read_prompts

    return None if path is None else read_prompts(path)


def inputs_from(path: Path | None) -> Any:
    """The inputs in a JSON file, None for no file."""
    from stepquant.pipelines.input_files import read_inputs

    return None if path is None else read_inputs(path)


def origin_from(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `stepquant.loading.resolve_pipeline` that say which files of a model to load."""
    return {name: options[name] for name in ("revision", "variant", "config")}
