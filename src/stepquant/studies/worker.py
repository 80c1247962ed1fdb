"""One cell of a study in a separate process, which isolates crashes and gives the peak memory of the cell."""

from __future__ import annotations

import signal
import sys
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import stepquant
from stepquant.calibration.collection import COLLECTING
from stepquant.evaluation.proxy import ClassifierProxy
from stepquant.evaluation.similarity import ssim
from stepquant.loading import resolve_pipeline
from stepquant.memory import peak_resident_bytes
from stepquant.models import denoiser_name
from stepquant.pipelines.call import kind_of
from stepquant.pipelines.generate import generate_many
from stepquant.pipelines.request import make_request
from stepquant.progress import Progress, Stopwatch
from stepquant.quality.fidelity import psnr
from stepquant.quiet import silence_libraries
from stepquant.studies.reference import reference
from stepquant.studies.spec import Cell

PACKAGES = ("stepquant", "torch", "diffusers")


def run_cell(cell: Cell, cache: Path) -> dict[str, Any]:
    """Quantize, generate and compare; return the cell's line.

    ``quantize_seconds`` is CPU time without the collection of samples, which cells share. ``peak_memory_bytes`` is the
    highest resident memory of this process up to the end of quantization, including libraries (about 0.5 GB).
    """
    pipeline = resolve_pipeline(cell.source)
    stopwatch = Stopwatch(clock=time.process_time)
    start = time.process_time()
    quantized = stepquant.quantize(
        pipeline,
        cell.spec,
        budget=cell.options.budget,
        activation_budget=cell.options.activation_budget,
        correction=cell.options.correction,
        recipe=cell.recipe,
        calibration=cell.calibration,
        guidance=cell.guidance,
        seed=cell.noise,
        cache=cache,
        progress=stopwatch,
        hyperparameters=cell.arguments,
        check=cell.recipe == "auto",  # which raises bits by it
    )
    seconds = time.process_time() - start - stopwatch.seconds[COLLECTING]
    peak = peak_resident_bytes()

    request = make_request(pipeline, cell.evaluation.steps, guidance=cell.guidance)
    full = reference(pipeline, request, cell.evaluation, cell.noise, cache)
    images = generate_many(quantized, request, cell.evaluation.images, cell.noise, Progress(), "")
    compared = slice(0, cell.evaluation.count)
    figures: dict[str, Any] = {
        "psnr_db": round(float(psnr(images[compared], full.images[compared]).mean()), 2),
        "ssim": round(float(ssim(images[compared], full.images[compared]).mean()), 4),
        "step_error_percent": full.step_errors(getattr(quantized, denoiser_name(quantized))),
    }
    proxy = ClassifierProxy.for_model(cell.source)
    if proxy is not None:
        for suffix, generated in (("", images), ("_fp32", full.images)):
            distance = proxy.frechet(generated)
            if distance is not None:
                figures[f"frechet_classifier{suffix}"] = round(distance, 3)
            if kind_of(pipeline) == "class":
                labels = [int(request.condition(index)) for index in range(len(generated))]
                figures[f"class_agreement{suffix}"] = round(proxy.agreement(generated, labels), 4)
    return cell.model_dump(mode="json") | {
        **figures,
        "quantize_seconds": round(seconds, 1),
        "peak_memory_bytes": peak,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name).partition("+")[0] for name in PACKAGES},
    }


def work(cell: Cell, cache: Path, answer: Connection) -> None:
    """Entry point of the process: send the line, or an error message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too and ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # as an exception, so that temporary folders are removed
    torch.set_num_threads(1)
    silence_libraries()
    try:
        answer.send(run_cell(cell, cache))
    except Exception as error:  # reported by the parent, which continues with the other cells
        answer.send(f"{type(error).__name__}: {error}")
