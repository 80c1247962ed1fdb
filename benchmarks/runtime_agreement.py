"""How close pictures drawn in integers are to the simulation's, and how close the simulation is to itself.

    python -m benchmarks.runtime_agreement [--models fashion-ddpm ...] [--bits w8a8 w4a8] [--recipe minmax] [--count 8]

Each model of the zoo is quantized, and the same pictures are drawn with the simulation (quantized values in floating
point, multiplied in float32) and with every runtime. Accumulators are exact everywhere, but what lies between the
layers is float32, added up in another order: now and then a value next to the middle of two codes falls on the other
side, and the trajectory takes another path from there. So the simulation is also compared with itself, its pictures
drawn one by one instead of in one batch, where torch adds up in another order, too. No runtime can be expected to be
closer than that. One line of JSON a model and bits goes to ``benchmarks/results/runtime-agreement.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import stepquant as sq
from stepquant.evaluation.fidelity import psnr
from stepquant.export.network import example_arguments
from stepquant.export.onnx import OnnxDenoiser, export_onnx
from stepquant.loading import resolve_pipeline
from stepquant.models import denoiser_name
from stepquant.nn.layers import Kernel, QuantizedModule
from stepquant.nn.tables import expand_groups
from stepquant.numerics.affine import dequantize, quantize
from stepquant.pipelines import draw, make_request
from stepquant.runtime import INTEGER
from stepquant.runtime.segments import along_channels, channel_dim, linear_map

RESULTS = Path(__file__).parent / "results" / "runtime-agreement.jsonl"
SEED = 0


class Simulation(Kernel):
    """``conv(Q(x), Q(w)) + bias`` on the values that codes stand for, as calibration has it; one step a batch."""

    def __init__(self, module: QuantizedModule) -> None:
        super().__init__()
        layer = module.layer()
        assert layer.activation is not None
        self.table, self.bias, self.balance = layer.activation, layer.bias, layer.balance
        self.weight, self.dim, self.apply_map = layer.weight.dequantize(), channel_dim(module), linear_map(module)

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        scale, zero_point = (self._spread(values, x) for values in self.table.at(row))
        divided = scale if self.balance is None else scale * along_channels(self.balance, self.dim, x.dim())
        seen = dequantize(quantize(x, divided, zero_point, self.table.bits), scale, zero_point)
        return self.apply_map(seen, self.weight, self.bias)

    def _spread(self, values: Tensor, x: Tensor) -> Tensor:
        if len(self.table.group_sizes) <= 1:
            return values[0]
        return along_channels(expand_groups(values[:, None], self.table.group_sizes)[:, 0], self.dim, x.dim())


def compare(pictures: Tensor, simulated: Tensor) -> dict[str, float]:
    """dB: of the mean squared error of all pictures together, of the worst picture, and of the one in the middle."""
    decibels = psnr(pictures, simulated)
    error = float((pictures.double() - simulated.double()).square().mean())
    pooled = 10 * math.log10(4 / error) if error else math.inf
    return {"pooled": round(min(pooled, 100.0), 2), "worst": round(float(decibels.min()), 2),
            "median": round(float(decibels.median()), 2)}  # fmt: skip


def agreement(model: str, bits: str, recipe: str, count: int, steps: int) -> dict[str, Any]:
    """Figures of one model."""
    full = resolve_pipeline(f"zoo:{model}")
    calibration = sq.Calibration(samples=64, steps=steps)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "quantized"
        sq.quantize(full, bits, recipe=recipe, calibration=calibration).save_pretrained(folder)

        def drawn(backend: Any, indices: range = range(count), exported: Path | None = None) -> Tensor:
            pipeline = sq.load(folder, backend=backend)
            name = denoiser_name(pipeline)
            if exported is not None:
                export_onnx(getattr(pipeline, name), example_arguments(pipeline), exported)
                setattr(pipeline, name, OnnxDenoiser(exported, getattr(pipeline, name), torch.get_num_threads()))
            return draw(pipeline, make_request(pipeline, steps), indices, SEED)

        simulated = drawn(Simulation)
        alone = torch.cat([drawn(Simulation, range(index, index + 1)) for index in range(count)])
        decibels = {"simulation, one by one": compare(alone, simulated)}
        for name in ("reference", *(name for name, reason_of in INTEGER.items() if reason_of() is None)):
            decibels[name] = compare(drawn(name), simulated)
        decibels["onnxruntime"] = compare(drawn("auto", exported=Path(temporary) / "network.onnx"), simulated)
    return {
        "model": model, "bits": bits, "recipe": recipe, "pictures": count, "steps": steps,
        "machine": platform.machine(), "threads": torch.get_num_threads(), "decibels": decibels,
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
