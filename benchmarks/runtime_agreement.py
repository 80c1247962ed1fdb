"""Agreement of the integer runtimes with the simulation, and of the simulation with itself.

    python -m benchmarks.runtime_agreement [--models fashion-ddpm ...] [--bits w8a8 w4a8] [--recipe minmax] [--count 8]

Each zoo model is quantized, and the same images are generated with the simulation (quantized values in floating
point, multiplied in float32) and with every runtime. Accumulators are exact everywhere, but the operations between
the layers are float32 and add in another order: occasionally a value near the middle of two codes is rounded the
other way, and the trajectory diverges from there. Therefore the simulation is also compared with itself, with images
generated one by one instead of in one batch, where torch adds in another order, too. No runtime can be expected to be
closer than that. A second comparison excludes diverging trajectories: it runs every runtime on the latents of the
simulation. The script appends one line of JSON per model and bits to ``benchmarks/results/runtime-agreement.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import stepquant as sq
from stepquant.core.affine import dequantize, quantize
from stepquant.core.qtensor import expand_groups
from stepquant.export.network import example_arguments
from stepquant.export.onnx import OnnxDenoiser, export_onnx
from stepquant.export.openvino import OpenVinoDenoiser, export_openvino
from stepquant.layers.conv import linear_map
from stepquant.layers.kernel import Kernel
from stepquant.layers.quantized import QuantizedModule
from stepquant.loading import resolve_pipeline
from stepquant.models import denoiser_name
from stepquant.models.description import main_tensor
from stepquant.pipelines.arguments import nest
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import Request, make_request
from stepquant.quality.fidelity import psnr
from stepquant.runtime import INTEGER
from stepquant.runtime.common import along_channels
from stepquant.studies.reference import TARGET, reference
from stepquant.studies.spec import Budget

EXPORTS = {
    "onnxruntime": (export_onnx, OnnxDenoiser, "onnx"),
    "openvino": (export_openvino, OpenVinoDenoiser, "xml"),
}
ONE_BY_ONE = "simulation, one by one"
RESULTS = Path(__file__).parent / "results" / "runtime-agreement.jsonl"
SEED = 0


class Simulation(Kernel):
    """``conv(Q(x), Q(w)) + bias`` on dequantized values, as during calibration; one step per batch."""

    def __init__(self, module: QuantizedModule) -> None:
        super().__init__()
        layer = module.layer()
        assert layer.input is not None
        self.grid, self.bias, self.smoothing = layer.input, layer.bias, layer.smoothing
        self.weight, self.dim, self.apply_map = layer.weight.dequantize(), module.channel_dim, linear_map(module)

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        scale, zero_point = (self._spread(values, x) for values in self.grid.at(row))
        divided = scale if self.smoothing is None else scale * along_channels(self.smoothing, self.dim, x.dim())
        rounded = dequantize(quantize(x, divided, zero_point, self.grid.bits), scale, zero_point)
        return self.apply_map(rounded, self.weight, self.bias)

    def _spread(self, values: Tensor, x: Tensor) -> Tensor:
        if len(self.grid.group_sizes) <= 1:
            return values[0, 0]
        return along_channels(expand_groups(values, self.grid.group_sizes)[:, 0], self.dim, x.dim())


def decibels(error: Tensor, peak: float) -> float:
    """PSNR of `error`, at most 100 dB."""
    mean_square = float(error.double().square().mean())
    return min(20 * math.log10(peak) - 10 * math.log10(mean_square), 100.0) if mean_square else 100.0


def of_images(images: Tensor, simulated: Tensor) -> dict[str, float]:
    """PSNR in dB: of all images together, of the worst image, and the median."""
    each = psnr(images, simulated)
    pooled = decibels(images - simulated, peak=2)
    return {"pooled": round(pooled, 2), "worst": round(float(each.min()), 2), "median": round(float(each.median()), 2)}


def of_outputs(run: Any, simulated: list[dict[str, Tensor]]) -> dict[str, float]:
    """PSNR in dB to the peak-to-peak of the simulation's output: of the worst step, and the median.

    Args:
        run: takes the arguments of each call of the denoiser in the simulation.
    """
    each = []
    for call in simulated:
        target = call[TARGET]
        output = run({name: tensor for name, tensor in call.items() if name != TARGET})
        each.append(decibels(output - target, peak=float(target.max() - target.min())))
    return {"worst": round(min(each), 2), "median": round(median(each), 2)}


def output_of(denoiser: Any, call: dict[str, Tensor]) -> Tensor:
    """The denoiser's output for a call's arguments."""
    with torch.inference_mode():
        return main_tensor(denoiser(**nest(call)))


def one_by_one(denoiser: Any, call: dict[str, Tensor]) -> Tensor:
    """The denoiser's output, computed sample by sample."""
    samples = max(len(tensor) for tensor in call.values() if tensor.dim())
    parts = [
        {name: tensor[index : index + 1] if tensor.dim() else tensor for name, tensor in call.items()}
        for index in range(samples)
    ]
    return torch.cat([output_of(denoiser, part) for part in parts])


def agreement(model: str, bits: str, recipe: str, count: int, steps: int) -> dict[str, Any]:
    """Results of one model."""
    full = resolve_pipeline(f"zoo:{model}")
    calibration = sq.Calibration(samples=64, steps=steps)
    images, outputs = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "quantized"
        sq.quantize(full, bits, recipe=recipe, calibration=calibration).save_pretrained(folder)

        def request_of(pipeline: Any) -> Request:
            return make_request(pipeline, steps)

        simulation = sq.load(folder, backend=Simulation)
        simulated = reference(
            simulation, request_of(simulation), Budget(count=count, steps=steps), SEED, Path(temporary)
        )
        (calls,) = simulated.calls

        def compare(name: str, pipeline: Any) -> None:
            generated = generate(pipeline, request_of(pipeline), range(count), SEED)
            denoiser = getattr(pipeline, denoiser_name(pipeline))
            images[name] = of_images(generated, simulated.images)
            outputs[name] = of_outputs(partial(output_of, denoiser), calls)

        singles = [generate(simulation, request_of(simulation), [index], SEED) for index in range(count)]
        images[ONE_BY_ONE] = of_images(torch.cat(singles), simulated.images)
        outputs[ONE_BY_ONE] = of_outputs(partial(one_by_one, getattr(simulation, denoiser_name(simulation))), calls)
        for name in ("reference", *(name for name, reason_of in INTEGER.items() if reason_of() is None)):
            compare(name, sq.load(folder, backend=name))
        for name, (export, exported_denoiser, suffix) in EXPORTS.items():
            pipeline, path = sq.load(folder), Path(temporary) / f"network.{suffix}"
            denoiser = getattr(pipeline, denoiser_name(pipeline))
            export(denoiser, example_arguments(pipeline), path)
            exported = exported_denoiser(path, denoiser, threads=torch.get_num_threads())
            setattr(pipeline, denoiser_name(pipeline), exported)
            compare(name, pipeline)
    return {
        "model": model, "bits": bits, "recipe": recipe, "count": count, "steps": steps,
        "machine": platform.machine(), "threads": torch.get_num_threads(), "images": images, "outputs": outputs,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["fashion-ddpm", "fashion-class", "emoji-ldm"])
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a8"])
    parser.add_argument("--recipe", default="minmax")
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    for model in options.models:
        for bits in options.bits:
            line = agreement(model, bits, options.recipe, options.count, options.steps)
            print(json.dumps(line, indent=2))
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
