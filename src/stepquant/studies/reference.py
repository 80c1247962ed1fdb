"""The full-precision images and denoiser calls that cells of one model and seed share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from stepquant.files import digest, tensors_digest
from stepquant.models import denoiser_name
from stepquant.models.description import main_tensor
from stepquant.pipelines.arguments import flatten, nest
from stepquant.pipelines.generate import batches, generate
from stepquant.pipelines.recording import on_call
from stepquant.pipelines.request import Request
from stepquant.studies.spec import Budget
from stepquant.workspace import Workspace

TARGET = "target"
"""Name of the denoiser's output among the tensors of a call; no denoiser has an argument of that name."""


@dataclass
class Reference:
    """The full-precision side of a comparison.

    Attributes:
        images: float32 [budget.images, C, H, W] in [-1, 1].
        calls: for each batch of the first ``budget.count`` images, each call of the denoiser in order: its arguments by
            name, and its output as ``target``.
    """

    images: Tensor
    calls: list[list[dict[str, Tensor]]] = field(default_factory=list)

    @torch.no_grad()
    def step_errors(self, quantized: nn.Module) -> list[float]:
        """Relative L2 error of the denoiser's output at each step, on the full-precision trajectory, in percent."""
        errors, norms = torch.zeros(2, len(self.calls[0]), dtype=torch.float64)
        for batch in self.calls:
            for step, call in enumerate(batch):
                target = call[TARGET].double()
                arguments = nest({name: tensor for name, tensor in call.items() if name != TARGET})
                output = main_tensor(quantized(**arguments)).double()
                errors[step] += (output - target).square().sum()
                norms[step] += target.square().sum()
        return [round(100 * value, 2) for value in (errors / norms).sqrt().tolist()]


def reference(pipeline: Any, request: Request, budget: Budget, noise: int, cache: Path) -> Reference:
    """Read the reference from `cache`, or generate it there in one process while the others wait."""
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    key = digest(
        [
            tensors_digest(dict(denoiser.state_dict())),
            [list(request.conditions), request.steps, request.guidance],
            {name: str(value) for name, value in sorted(pipeline.scheduler.config.items())},
            [budget.count, budget.images, noise],
        ]
    )
    stage = f"reference-{key[:16]}"
    workspace = Workspace(cache)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{stage}.lock"):
        stored = workspace.load(stage)
        if stored is None:
            generated = _generate(pipeline, denoiser, request, budget, noise)
            workspace.save(stage, _packed(generated))
            return generated
    return _unpacked(stored)


def _generate(pipeline: Any, denoiser: nn.Module, request: Request, budget: Budget, noise: int) -> Reference:
    calls: list[list[dict[str, Tensor]]] = []

    def record(arguments: dict[str, Any], output: Any) -> None:
        flat = {name: value for key, given in arguments.items() for name, value in flatten(key, given)}
        tensors = {name: value.detach().clone() for name, value in flat.items() if isinstance(value, Tensor)}
        if "timestep" not in tensors:
            tensors["timestep"] = torch.as_tensor(flat["timestep"])
        calls[-1].append(tensors | {TARGET: main_tensor(output).detach().clone()})

    images = []
    remove = on_call(denoiser, record)
    for indices in batches(budget.count):
        calls.append([])
        images.append(generate(pipeline, request, indices, noise, split=False))
    remove()
    for indices in batches(budget.images - budget.count):
        images.append(generate(pipeline, request, [budget.count + index for index in indices], noise))
    return Reference(torch.cat(images), calls)


def _packed(reference: Reference) -> dict[str, Tensor]:
    tensors = {"images": reference.images}
    for batch, calls in enumerate(reference.calls):
        for step, call in enumerate(calls):
            tensors |= {f"{batch}/{step}/{name}": tensor for name, tensor in call.items()}
    return tensors


def _unpacked(tensors: dict[str, Tensor]) -> Reference:
    images = tensors.pop("images")
    keys = [(int(batch), int(step), name) for batch, step, name in (path.split("/") for path in tensors)]
    batch_count = 1 + max(batch for batch, _, _ in keys)
    step_count = 1 + max(step for _, step, _ in keys)
    calls: list[list[dict[str, Tensor]]] = [[{} for _ in range(step_count)] for _ in range(batch_count)]
    for (batch, step, name), tensor in zip(keys, tensors.values(), strict=True):
        calls[batch][step][name] = tensor
    return Reference(images, calls)
