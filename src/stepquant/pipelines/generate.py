"""Generate images with any diffusers pipeline in the same way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stepquant.distributed import Ranks
from stepquant.errors import StepquantError, first_line
from stepquant.models import denoiser_name
from stepquant.pipelines.overflow import watched
from stepquant.pipelines.request import Request, call_parameters, check_dtype, kind_of
from stepquant.progress import Progress

BATCH_SIZE = 16
"""Default number of images generated at a time."""


def generate(
    pipeline: Any,
    request: Request,
    indices: Sequence[int],
    seed: int,
    *,
    decode: bool = True,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Return the images with the given indices: float32 [N, C, H, W] in [-1, 1].

    Image i starts from the noise of ``seed + i`` and has condition i of the request, so that it does not depend on the
    batch that it is generated in. Nothing of the pipeline is changed, other than what its own call changes.

    Args:
        decode: whether to decode latents; ignored by a pipeline without an autoencoder.
        on_step: called once per denoising step.

    Raises:
        StepquantError: if the denoiser outputs NaN or infinity, naming the layer and the step where it first occurs; if
            the pipeline rejects an argument, or cannot output images in its dtype.
    """
    check_dtype(pipeline)
    arguments = _arguments(pipeline, request, indices, seed, decode)
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    try:
        with torch.no_grad(), _without_progress_bar(pipeline), watched(denoiser, on_step):
            images = pipeline(**arguments).images
    except ValueError as error:  # how pipelines reject arguments
        raise StepquantError(f"{type(pipeline).__name__} rejects its arguments: {first_line(error)}.") from error
    if isinstance(images, Tensor):
        return images
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1


def _arguments(pipeline: Any, request: Request, indices: Sequence[int], seed: int, decode: bool) -> dict[str, Any]:
    kind = kind_of(pipeline)
    arguments: dict[str, Any] = {
        "num_inference_steps": request.steps,
        "generator": [torch.Generator().manual_seed(seed + index) for index in indices],
        "output_type": "np" if decode or kind != "text" else "latent",
    }
    if request.size is not None:
        arguments |= {"height": request.size, "width": request.size}
        if "use_resolution_binning" in call_parameters(pipeline):
            arguments["use_resolution_binning"] = False  # PixArt would change the size to one it was trained on
    if request.guidance is not None and kind != "unconditional":
        arguments["guidance_scale"] = request.guidance
    if kind == "unconditional":
        arguments["batch_size"] = len(indices)
    else:
        name = "class_labels" if kind == "class" else "prompt"
        arguments[name] = [request.condition(index) for index in indices]
    return arguments | dict(request.inputs)


@contextmanager
def _without_progress_bar(pipeline: Any) -> Iterator[None]:
    before = vars(pipeline).get("_progress_bar_config")
    pipeline.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is None:
            del pipeline._progress_bar_config
        else:
            pipeline._progress_bar_config = before


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
    """Return images 0 to ``count - 1``, generated in batches: float32 [count, C, H, W] in [-1, 1]; see `generate`.

    Args:
        ranks: processes that share the batches; each returns all images.

    Raises:
        StepquantError: if `count` is less than 1.
    """
    if count < 1:
        raise StepquantError(f"count is {count}; expected at least 1 image.")
    with progress.task(description, count * request.steps) as advance:

        def images_of(indices: range) -> Tensor:
            return generate(pipeline, request, indices, seed, on_step=functools.partial(advance, len(indices)))

        return torch.cat(list((ranks or Ranks()).map(images_of, batches(count, batch_size))))


def batches(count: int, size: int = BATCH_SIZE) -> list[range]:
    """Return the indices 0 to ``count - 1`` as consecutive ranges of at most `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
