"""Generate samples with any diffusers pipeline in the same way."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stepquant.distributed import Ranks
from stepquant.errors import StepquantError, first_line
from stepquant.models.denoisers import primary_denoisers
from stepquant.pipelines.call import call_parameters, gives_latents, step_parameters, takes_batches
from stepquant.pipelines.outputs import samples_of
from stepquant.pipelines.overflow import watched
from stepquant.pipelines.request import Request, check_dtype
from stepquant.pipelines.steps import StepCounter
from stepquant.progress import Progress

BATCH_SIZE = 16
"""Default number of samples generated at a time."""


MEDIA = ("image", "mask_image", "control_image", "video", "mask", "image_embeds", "audio")
"""Parameters that some pipelines need although they have a default."""

OF_DENOISERS = ("stepquant.layers.", "stepquant.runtime.")
"""What a quantized denoiser computes with."""


def generate(
    pipeline: Any,
    request: Request,
    indices: Sequence[int],
    seed: int,
    *,
    decode: bool = True,
    on_step: Callable[[], None] | None = None,
    split: bool = True,
) -> Tensor:
    """Return the samples with the given indices: float32.

    Images [N, C, H, W] and video [N, C, F, H, W] are in [-1, 1]; audio is [N, C, L].

    Sample i starts from the noise of ``seed + i`` and has condition i of the request, so that it does not depend on the
    batch that it is generated in. Nothing of the pipeline is changed, other than what its own call changes. A pipeline
    that takes one sample at a time is called for each (`stepquant.pipelines.call.takes_batches`).

    Args:
        decode: whether to decode latents; ignored by a pipeline without an autoencoder.
        on_step: called once per denoising step.
        split: whether a pipeline that rejects several samples is called for each of them: some take no image that
            several prompts share. What records calls of the denoiser does without.

    Raises:
        RejectedError: if the pipeline rejects an argument.
        StepquantError: if a denoiser outputs NaN or infinity, naming the layer and the step where it first occurs; if
            the pipeline cannot output images in its dtype.
    """
    check_dtype(pipeline)
    has_inputs = bool(request.inputs or request.each)

    def call(part: Sequence[int]) -> Tensor:
        return _call(pipeline, _arguments(pipeline, request, part, seed, decode), has_inputs, on_step)

    if len(indices) == 1 or takes_batches(pipeline):
        try:
            return call(indices)
        except RejectedError:
            if len(indices) == 1 or not split:
                raise
    return _joined(pipeline, [call([index]) for index in indices])


def _joined(pipeline: Any, samples: list[Tensor]) -> Tensor:
    shapes = sorted({tuple(sample.shape[1:]) for sample in samples})
    if len(shapes) > 1:
        raise StepquantError(
            f"{type(pipeline).__name__} generates samples of the shapes {shapes[0]} and {shapes[1]}; expected one "
            "shape. Give inputs of equal sizes."
        )
    return torch.cat(samples)


class RejectedError(StepquantError):
    """A pipeline rejects its arguments."""


def _call(pipeline: Any, arguments: dict[str, Any], has_inputs: bool, on_step: Callable[[], None] | None) -> Tensor:
    counter = StepCounter()
    try:
        with (
            torch.no_grad(),
            _without_progress_bar(pipeline),
            watched(primary_denoisers(pipeline).values(), on_step, counter),
        ):
            output = pipeline(**arguments)
    except (ImportError, NameError) as error:
        raise StepquantError(
            f"{type(pipeline).__name__} needs a package that is not installed: {first_line(error)}. Install it."
        ) from error
    except Exception as error:
        # A pipeline checks its arguments with exceptions of any class; wrong shapes may show up in a denoiser only.
        in_first_call = isinstance(error, RuntimeError) and not counter.finished
        of_arguments = isinstance(error, ValueError) or counter.step < 0 or has_inputs or in_first_call
        if type(error).__module__ != "builtins" or not of_arguments or _raised_by_hook(error):
            raise
        message = f"{type(pipeline).__name__} rejects its arguments: {first_line(error)}."
        left_out = [name for name in call_parameters(pipeline) if name in MEDIA and arguments.get(name) is None]
        if left_out and counter.step < 0:
            message += f" Pass what its call needs as `inputs`; it also takes {', '.join(left_out)}."
        elif in_first_call and not has_inputs:
            message += " Pass arguments that its denoiser takes as `inputs`, such as a size."
        raise RejectedError(message) from error
    return samples_of(output)


def _raised_by_hook(error: Exception) -> bool:
    """Whether an exception comes from code of this package that runs within a pipeline's call, such as a hook that
    records; the layers of a quantized denoiser, which are part of the pipeline, do not count."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][1:]
    code = {(str(frame.f_globals.get("__name__")), frame.f_code.co_name) for frame in frames}
    return any(name.startswith("stepquant.") and not name.startswith(OF_DENOISERS) and function != "forward"
               for name, function in code)  # fmt: skip


def _arguments(pipeline: Any, request: Request, indices: Sequence[int], seed: int, decode: bool) -> dict[str, Any]:
    parameters = call_parameters(pipeline)
    generators = [torch.Generator().manual_seed(seed + index) for index in indices]
    arguments: dict[str, Any] = dict.fromkeys(step_parameters(pipeline), request.steps)
    arguments |= {
        "output_type": "latent" if not decode and gives_latents(pipeline) else "np",
        "height": request.size,
        "width": request.size,
        "guidance_scale": request.guidance,
        # PixArt would change the size to one it was trained on.
        "use_resolution_binning": None if request.size is None else False,
        "batch_size": len(indices),
    }
    batched = takes_batches(pipeline)
    arguments["generator"] = generators if batched else generators[0]
    if request.conditions:
        conditions = [request.condition(index) for index in indices]
        arguments["prompt" if "prompt" in parameters else "class_labels"] = conditions if batched else conditions[0]
    fitting = {name: value for name, value in arguments.items() if name in parameters and value is not None}
    inputs = request.inputs_of(indices) if batched else request.input_of(indices[0])
    if batched:  # Qwen-Image does not repeat one negative prompt for several prompts
        inputs = {name: _repeated(name, value, len(indices)) for name, value in inputs.items()}
    return fitting | inputs


def _repeated(name: str, value: Any, samples: int) -> Any:
    return [value] * samples if name.startswith("negative_prompt") and isinstance(value, str) else value


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
    """Return samples 0 to ``count - 1``, generated in batches: float32 [count, C, ...]; see `generate`.

    Args:
        ranks: processes that share the batches; each returns all samples.

    Raises:
        StepquantError: if `count` is less than 1.
    """
    if count < 1:
        raise StepquantError(f"count is {count}; expected at least 1 image.")
    with progress.task(description, count * request.steps) as advance:

        def samples_at(indices: range) -> Tensor:
            return generate(pipeline, request, indices, seed, on_step=functools.partial(advance, len(indices)))

        return _joined(pipeline, list((ranks or Ranks()).map(samples_at, batches(count, batch_size))))


def batches(count: int, size: int = BATCH_SIZE) -> list[range]:
    """Return the indices 0 to ``count - 1`` as consecutive ranges of at most `size`."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
