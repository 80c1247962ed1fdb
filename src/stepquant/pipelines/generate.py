"""Driving any diffusers pipeline the same way: what it is conditioned on, and how to draw images from it."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stepquant.distributed import Ranks
from stepquant.errors import StepquantError, first_line
from stepquant.models import denoiser_name
from stepquant.pipelines.overflow import watched
from stepquant.progress import Progress

Kind = Literal["unconditional", "class", "text"]

BATCH_SIZE = 16
"""Images drawn at a time, unless told otherwise."""


def kind_of(pipeline: Any) -> Kind:
    """What a pipeline's images are conditioned on, read off the signature of its call."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if "prompt" in parameters:
        return "text"
    return "class" if "class_labels" in parameters else "unconditional"


@dataclass(frozen=True)
class Request:
    """What to draw.

    Attributes:
        conditions: a prompt or a class label for each image (used in turn); empty for an unconditional model.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; None leaves it to the pipeline.
        size: height and width in pixels; None leaves them to the pipeline, which draws at its model's own size.
        inputs: further arguments of the pipeline's call, such as the image that it starts from.
    """

    conditions: tuple[str | int, ...] = ()
    steps: int = 50
    guidance: float | None = None
    size: int | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def condition(self, index: int) -> str | int:
        return self.conditions[index % len(self.conditions)]


def make_request(
    pipeline: Any,
    steps: int,
    *,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    guidance: float | None = None,
    size: int | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Request:
    """A request that fits the pipeline; without prompts or labels, its own examples are drawn in turn.

    Raises:
        StepquantError: for a prompt to a model that takes none, a label that does not exist, fewer than one step, a
            guidance that is no number, a size that the pipeline does not let one choose, or an image that it needs and
            was not given.
    """
    kind = kind_of(pipeline)
    name = type(pipeline).__name__
    if steps < 1:
        raise StepquantError(f"steps are {steps}: expected at least 1.")
    trained = getattr(pipeline.scheduler.config, "num_train_timesteps", steps)
    if steps > trained:
        raise StepquantError(f"steps are {steps}, but the model knows {trained} timesteps: ask for at most as many.")
    if guidance is not None and not math.isfinite(guidance):
        raise StepquantError(f"guidance is {guidance}: expected a finite number.")
    if prompts is not None and kind != "text":
        raise StepquantError(f"a prompt was given, but {name} is {_described(kind)}: leave the prompt out.")
    if labels is not None and kind != "class":
        raise StepquantError(f"a label was given, but {name} is {_described(kind)}: leave the label out.")
    parameters = inspect.signature(type(pipeline).__call__).parameters
    inputs = dict(inputs or {})
    for key in inputs:
        if key not in parameters:
            raise StepquantError(f"input {key!r} was given, but the call of {name} takes no such argument.")
    if "image" in parameters and "image" not in inputs:
        raise StepquantError(
            f"{name} draws from an image: give what its call needs in `inputs`, such as image=..., or quantize the "
            "denoiser through a pipeline that draws from noise."
        )
    if size is not None and "height" not in parameters:
        raise StepquantError(f"a size was given, but {name} draws at one size only: leave it out.")
    if kind == "class":
        known = _labels(pipeline)
        for label in labels or ():
            if label not in known:
                raise StepquantError(f"label {label} does not exist: expected {known[0]} to {known[-1]}.")
        return Request(tuple(labels or known), steps, guidance, size, inputs)
    if kind == "text":
        return Request(tuple(prompts or default_prompts(pipeline)), steps, guidance, size, inputs)
    return Request((), steps, guidance, size, inputs)


def _described(kind: Kind) -> str:
    what = {"unconditional": "unconditional", "class": "conditioned on class labels", "text": "conditioned on text"}
    return what[kind]


def _labels(pipeline: Any) -> list[int]:
    named = getattr(pipeline, "labels", None)
    return sorted(set(named.values())) if named else list(range(pipeline.transformer.config.num_embeds_ada_norm))


def default_prompts(pipeline: Any) -> list[str]:
    """The prompts a model was shipped with (``prompts.txt`` in its folder), or a general list."""
    own = Path(str(getattr(pipeline.config, "_name_or_path", ""))) / "prompts.txt"
    source = own if own.is_file() else Path(__file__).with_name("prompts.txt")
    return read_prompts(source)


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; blank lines are skipped. Raises `StepquantError` if there is none."""
    try:
        prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise StepquantError(f"prompts file {path} cannot be read: {error}.") from None
    if not prompts:
        raise StepquantError(f"prompts file {path} holds no prompt: write one a line.")
    return prompts


def check_dtype(pipeline: Any) -> None:
    """Raise `StepquantError` if the pipeline cannot give out images in its dtype."""
    if kind_of(pipeline) == "unconditional" and getattr(pipeline, denoiser_name(pipeline)).dtype == torch.bfloat16:
        raise StepquantError(
            f"{type(pipeline).__name__} gives images as NumPy arrays, which have no bfloat16: load it in float32 or "
            "float16 (--dtype)."
        )


def generate(
    pipeline: Any,
    request: Request,
    indices: Sequence[int],
    seed: int,
    *,
    decode: bool = True,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Draw the images of the given indices: float32 [N, C, H, W] in [-1, 1].

    Image i starts from the noise of seed + i and has the request's i-th condition, so it does not depend on the
    batch it is drawn in.

    Args:
        decode: whether latents are decoded; a pipeline without an autoencoder ignores it.
        on_step: called after each denoising step.

    Raises:
        StepquantError: if the denoiser puts out NaN or infinity, naming the layer and the step where that began; if the
            pipeline refuses an argument, or cannot give out images in its dtype.
    """
    kind = kind_of(pipeline)
    check_dtype(pipeline)
    arguments: dict[str, Any] = {
        "num_inference_steps": request.steps,
        "generator": [torch.Generator().manual_seed(seed + index) for index in indices],
        "output_type": "np",
    }
    if request.size is not None:
        arguments |= {"height": request.size, "width": request.size}
        if "use_resolution_binning" in inspect.signature(type(pipeline).__call__).parameters:
            arguments["use_resolution_binning"] = False  # PixArt would draw at the nearest size it was trained on
    if request.guidance is not None and kind != "unconditional":
        arguments["guidance_scale"] = request.guidance
    if kind == "unconditional":
        arguments["batch_size"] = len(indices)
    elif kind == "class":
        arguments["class_labels"] = [request.condition(index) for index in indices]
    else:
        arguments["prompt"] = [request.condition(index) for index in indices]
        if not decode:
            arguments["output_type"] = "latent"
    arguments |= request.inputs
    handle = _after_each_step(pipeline, on_step)
    try:
        with torch.no_grad(), watched(getattr(pipeline, denoiser_name(pipeline))):
            images = pipeline(**arguments).images
    except ValueError as error:  # a pipeline's word for arguments that do not suit it
        raise StepquantError(f"{type(pipeline).__name__} does not draw this: {first_line(error)}.") from error
    finally:
        handle()
    if isinstance(images, Tensor):
        return images
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1


def generate_many(
    pipeline: Any,
    request: Request,
    count: int,
    seed: int,
    progress: Progress,
    description: str,
    batch_size: int = BATCH_SIZE,
    ranks: Ranks | None = None,
) -> Tensor:
    """Draw images 0 to count - 1 in batches: float32 [count, C, H, W] in [-1, 1]; see `generate`.

    Args:
        ranks: share the batches; all get all images.

    Raises:
        StepquantError: if fewer than one image is asked for.
    """
    if count < 1:
        raise StepquantError(f"count is {count}: expected at least 1 image.")
    with progress.task(description, count * request.steps) as advance:

        def images_of(indices: range) -> Tensor:
            return generate(pipeline, request, indices, seed, on_step=functools.partial(advance, len(indices)))

        return torch.cat(list((ranks or Ranks()).map(images_of, batches(count, batch_size))))


def batches(count: int, size: int = BATCH_SIZE) -> list[range]:
    """0 to count - 1 in consecutive ranges of at most `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _after_each_step(pipeline: Any, on_step: Callable[[], None] | None) -> Callable[[], None]:
    """Silence the pipeline's own bar and report its steps instead; returns what undoes that."""
    previous = getattr(pipeline, "_progress_bar_config", None)
    pipeline.set_progress_bar_config(disable=True)
    original = pipeline.scheduler.step

    @functools.wraps(original)  # pipelines read the signature to see what a scheduler accepts
    def step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if on_step is not None:
            on_step()
        return result

    pipeline.scheduler.step = step

    def undo() -> None:
        del pipeline.scheduler.step
        pipeline._progress_bar_config = previous if previous is not None else {}

    return undo
