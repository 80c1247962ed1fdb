"""One training loop for all reference models: resumable, reproducible, with an exponential moving average."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LossFunction = Callable[[int, torch.Generator], Tensor]
"""``loss(step, generator)``: all random numbers come from the generator, so that restarts are reproducible."""


@dataclass
class Plan:
    """Settings of a training run; `out` is the folder of its checkpoints."""

    out: Path
    steps: int
    batch: int
    learning_rate: float
    seed: int = 0
    warmup: int = 200
    ema: float = 0.999
    weight_decay: float = 1e-4
    save_every: int = 500


def arguments(description: str, *, steps: int, batch: int, learning_rate: float) -> argparse.ArgumentParser:
    """The options that all training commands share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints; an existing run is continued")
    parser.add_argument("--export", type=Path, help="write the finished model (EMA weights) to this folder")
    parser.add_argument("--init", type=Path, help="folder of an exported model to start a new run from")
    parser.add_argument("--export-only", action="store_true", help="export the newest checkpoint without training")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def plan_from(options: argparse.Namespace) -> Plan:
    """Create the plan of parsed `arguments`; set the number of threads and the seed."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    return Plan(options.out, options.steps, options.batch, options.learning_rate, options.seed)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """Compute in bfloat16, except on CPUs that have no instructions for it."""
    enabled = device().type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device().type, torch.bfloat16, enabled=enabled)


def train(plan: Plan, model: nn.Module, loss_function: LossFunction, *, plain_attention: bool = True) -> nn.Module:
    """Train `model` up to step `plan.steps` from the newest checkpoint; return it with the EMA weights.

    Args:
        plain_attention: call `use_plain_attention`; False if the model's attention has processors that must stay.
    """
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True
    )
    ema = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    step, seconds = _restore(plan, parameters, ema, optimizer)
    note = TextColumn("{task.fields[note]}")
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
    if plain_attention:
        use_plain_attention(model)
    model.train()
    start, average = time.monotonic() - seconds, None
    with Progress(*columns, refresh_per_second=0.5) as progress:
        task = progress.add_task(plan.out.name, total=plan.steps, completed=step, note="")
        while step < plan.steps:
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate * _schedule(step, plan)
            generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + step)
            loss = loss_function(step, generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            step += 1
            _update_ema(ema, parameters, min(plan.ema, (1 + step) / (10 + step)))
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            progress.update(task, advance=1, note=f"loss {average:.4f}")
            if step % plan.save_every == 0 or step == plan.steps:
                _save(plan, step, time.monotonic() - start, average, parameters, ema, optimizer)
    for name, parameter in parameters.items():
        parameter.data.copy_(ema[name])
    return model.eval()


def use_plain_attention(model: nn.Module) -> None:
    """Replace fused attention in `model`: on a CPU its backward pass takes a third of a step."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


def load_ema(model: nn.Module, out: Path) -> nn.Module:
    """Load the EMA weights of the newest checkpoint in `out`."""
    tensors = load_file(out / "checkpoint.safetensors")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"ema.{name}"])
    return model.eval()


def _schedule(step: int, plan: Plan) -> float:
    """Linear warm-up, then cosine to zero at the last step."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - plan.warmup) / max(1, plan.steps - plan.warmup)))


@torch.no_grad()
def _update_ema(ema: dict[str, Tensor], parameters: dict[str, nn.Parameter], decay: float) -> None:
    torch._foreach_lerp_(list(ema.values()), [p.data for p in parameters.values()], 1 - decay)


def _save(
    plan: Plan,
    step: int,
    seconds: float,
    loss: float,
    parameters: dict[str, nn.Parameter],
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    plan.out.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": parameter.data for name, parameter in parameters.items()}
    tensors |= {f"ema.{name}": value for name, value in ema.items()}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        tensors |= {f"m.{name}": state["exp_avg"], f"v.{name}": state["exp_avg_sq"]}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    state_line = json.dumps({"step": step, "seconds": round(seconds), "loss": loss, "steps": plan.steps})
    target = plan.out / "checkpoint.safetensors"
    save_file(tensors, target.with_suffix(".tmp"), metadata={"state": state_line})
    target.with_suffix(".tmp").replace(target)
    with (plan.out / "log.jsonl").open("a") as log:
        log.write(state_line + "\n")


def _restore(
    plan: Plan, parameters: dict[str, nn.Parameter], ema: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    target = plan.out / "checkpoint.safetensors"
    if not target.exists():
        return 0, 0.0
    state = state_of(plan.out)
    tensors = load_file(target)
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"model.{name}"])
        ema[name].copy_(tensors[f"ema.{name}"])
        optimizer.state[parameter] = {
            "step": torch.tensor(float(state["step"]), device=parameter.device),
            "exp_avg": torch.empty_like(parameter).copy_(tensors[f"m.{name}"]),
            "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[f"v.{name}"]),
        }
    return state["step"], state["seconds"]


def state_of(out: Path) -> dict[str, float]:
    """Step, elapsed seconds and loss of the newest checkpoint in `out`."""
    with safe_open(out / "checkpoint.safetensors", "pt") as file:
        return json.loads(file.metadata()["state"])


def plans_of(out: Path) -> list[tuple[int, int]]:
    """``(total, last step under that total)`` for each total number of steps of the run in `out`."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return list({line["steps"]: (line["steps"], line["step"]) for line in lines}.values())


def export_half(pipeline: DiffusionPipeline, options: argparse.Namespace, files: dict[str, str]) -> None:
    """Save a diffusers pipeline in fp16 with extra text `files` (name -> content) as ``options.export``, atomically."""
    draft, previous = options.out / "export", options.out / "previous"
    shutil.rmtree(draft, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)
    pipeline.to(torch.float16)
    pipeline.save_pretrained(draft)
    for config in draft.glob("*/config.json"):
        # transformers loads in this dtype, diffusers in float32: use one dtype in the whole pipeline.
        config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    for name, content in files.items():
        (draft / name).write_text(content)
    if options.export.exists():
        shutil.move(options.export, previous)
    shutil.move(draft, options.export)
