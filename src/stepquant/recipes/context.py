"""What every stage of a recipe is given: the model, what to make of it, and where to keep what is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from stepquant import version
from stepquant.calibration.float32 import computing_in_float32
from stepquant.calibration.image_folder import ImageFolder
from stepquant.calibration.placement import placed
from stepquant.calibration.samples import Calibration, CalibrationSet
from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.files import digest, fingerprint, tensors_digest
from stepquant.models import ModelDescription, chunk_size
from stepquant.models.dataflow import is_layer
from stepquant.models.denoisers import modules, schedulers
from stepquant.pipelines.description import describe_component
from stepquant.pipelines.request import Request
from stepquant.pipelines.share import own_steps
from stepquant.progress import Progress
from stepquant.workspace import Workspace


@dataclass(frozen=True)
class Context:
    """The quantization of one denoiser of a pipeline.

    Attributes:
        pipeline: the full-precision diffusers pipeline; never modified.
        component: name of the denoiser among the pipeline's components, such as ``"transformer_2"``.
        spec: bits and overrides.
        calibration: how many samples, over how many steps.
        request: the conditions that calibration images are generated with.
        seed: of everything random.
        workspace: keeps finished stages.
        progress: receives the progress of each task.
        cache: keeps calibration samples for other runs on the same model, request and seed; by default they lie in
            `workspace`.
        device: where blocks compute, one at a time; None: where the denoiser is.
        images: what training learns from, besides full precision.
        calls: recorded calls to calibrate on, for a denoiser without a pipeline (`stepquant.custom_model`).
        memo: what was found out about the denoiser, shared with contexts made from this one by ``replace``.
    """

    pipeline: Any
    component: str
    spec: QuantSpec
    calibration: Calibration
    request: Request
    seed: int
    workspace: Workspace
    progress: Progress = field(default_factory=Progress)
    cache: Workspace | None = None
    device: torch.device | None = None
    images: ImageFolder | None = None
    calls: CalibrationSet | None = None
    memo: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def denoiser(self) -> nn.Module:
        """The full-precision denoiser."""
        denoiser: nn.Module = getattr(self.pipeline, self.component)
        return denoiser

    @cached_property
    def steps(self) -> int:
        """Number of the sampler's steps that the denoiser takes part in."""
        if self.calls is not None:
            return int(self.calls.steps.max()) + 1
        return own_steps(self.pipeline, self.component, self.request)

    @cached_property
    def reference(self) -> nn.Module:
        """What the quantized denoiser is fitted to: the denoiser, computing in float32 whatever its weights are in."""
        return computing_in_float32(self.denoiser)

    @property
    def description(self) -> ModelDescription:
        """Description of the denoiser; the pipeline runs up to one call of it when this is first read."""
        if "description" not in self.memo:
            layers = [name for name, module in self.denoiser.named_modules() if is_layer(module)]
            with placed(self.denoiser, layers, self.device):
                self.memo["description"] = describe_component(self.pipeline, self.component, self.request, self.seed)
        return self.memo["description"]

    @cached_property
    def chunk(self) -> int:
        """Samples that pass through the model at a time."""
        return chunk_size(self.denoiser)

    @cached_property
    def sampling_key(self) -> str:
        """Stands for all inputs of sampling, and so for whatever is seen on trajectories, at any bits."""
        weights = tensors_digest(dict(self.denoiser.state_dict()))
        if self.calls is not None:
            calls = tensors_digest(self.calls.to_tensors())
            return digest([version.__version__, torch.__version__, weights, calls, self.chunk, self.seed])
        others = {name: part for name, part in modules(self.pipeline) if part is not self.denoiser}
        return digest(
            [
                [version.__version__, torch.__version__, diffusers.__version__],
                [self.component, weights],
                # What encodes prompts and images.
                {name: _weights_digest(part) for name, part in others.items()},
                self.calibration.model_dump(),
                self.chunk,
                [list(self.request.conditions), self.request.steps, self.request.guidance],
                fingerprint(self.request.all_inputs()),
                [
                    [name, type(part).__name__, {key: str(value) for key, value in sorted(part.config.items())}]
                    for name, part in sorted(schedulers(self.pipeline).items())
                ],
                self.seed,
            ]
        )

    @cached_property
    def key(self) -> str:
        """Stands for all inputs: of sampling, and the spec."""
        return digest([self.sampling_key, self.spec.model_dump()])

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Compute the denoiser's blocks on `device` for the duration of the context."""
        with placed(self.denoiser, self.description.blocks, self.device):
            yield

    def generator(self) -> torch.Generator:
        """A new generator of random numbers, seeded by `seed`."""
        return torch.Generator().manual_seed(self.seed)

    def cached(self, name: str, compute: Callable[[], dict[str, Tensor]], *, shared: bool = False) -> dict[str, Tensor]:
        """What `compute` returned when it was run first under this name.

        Args:
            name: stands for everything that the tensors depend on (`Stage.key`).
            shared: keep them in `cache`, for other runs; they depend on sampling alone.
        """
        kept = self.cache if shared and self.cache else self.workspace
        stored = kept.load(name)
        if stored is None:
            stored = compute()
            kept.save(name, stored)
        return stored

    def check_whole(self, what: str) -> None:
        """Raise `StepquantError` if `device` is set, because `what` needs the whole network on one device."""
        if self.device is not None:
            raise StepquantError(
                f"{what} trains the whole network at once, but device={self.device} loads one block at a time. Move "
                "the pipeline to the device and leave `device` out, or use a recipe that works block by block (minmax, "
                "ptq4dm, q-diffusion, pqd, tdq, eda-dm)."
            )


def _weights_digest(model: nn.Module) -> str:
    """Of a model's weights; those that are on no device, or packed by another library, are left out."""
    tensors = model.state_dict().items()
    return tensors_digest({name: tensor for name, tensor in tensors if type(tensor) is Tensor and not tensor.is_meta})
