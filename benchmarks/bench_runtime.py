"""Time a forward pass in float32 and in int8, and show where the int8 pass spends its time.

    python benchmarks/bench_runtime.py [--batch 16] [--runs 7] [--threads 2] [--profile]

Weights are random, every linear and convolution is w8a8 with min-max ranges, attention operands stay floating point.
Runs are interleaved and the median is printed: on a busy machine the ratio means more than the times.
"""

from __future__ import annotations

import argparse
import copy
import time
from statistics import median

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from stepquant import zoo
from stepquant.nn.clock import StepClock
from stepquant.nn.deploy import Quantization, install, replace_module
from stepquant.nn.layers import can_quantize
from stepquant.nn.trainable import TrainableLayer, wrap
from stepquant.runtime import prepare


def small_unet() -> UNet2DModel:
    """The network of ``zoo:fashion-ddpm``: grey pictures at 32x32, 32 to 128 channels."""
    return UNet2DModel.from_config(UNet2DModel.load_config(zoo.path("fashion-ddpm"), subfolder="unet"))


def cifar_unet() -> UNet2DModel:
    """The architecture of DDPM on CIFAR-10 (arXiv 2006.11239): 35.7 million parameters, 128 and 256 channels."""
    return UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_num_groups=32,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )


def quantized(model: UNet2DModel, x: Tensor) -> nn.Module:
    """A copy in int8, ranges observed on x."""
    observed, clock = copy.deepcopy(model), StepClock()
    layers: dict[str, TrainableLayer] = {}
    for name, module in model.named_modules():
        if can_quantize(module):
            layer = wrap(observed.get_submodule(name), 8, 8, clock, weight_range="minmax")
            replace_module(observed, name, layer)
            assert layer.activation_quantizer is not None
            layer.activation_quantizer.observing = True
            layers[name] = layer
    observed(x, 500)
    for layer in layers.values():
        assert layer.activation_quantizer is not None
        layer.activation_quantizer.set_range("minmax")
    result = copy.deepcopy(model)
    install(result, Quantization(clock.timesteps, {name: layer.freeze() for name, layer in layers.items()}))
    prepare(result, "onednn")
    return result


def compare(name: str, model: UNet2DModel, batch: int, runs: int, profile: bool) -> None:
    model = model.eval().requires_grad_(False)
    x = torch.randn(batch, model.config["in_channels"], 32, 32)
    models = {"float32": model, "int8": quantized(model, x)}
    expected, found = (each(x, 500).sample for each in models.values())
    noise = float((found - expected).square().mean() / expected.square().mean())
    times: dict[str, list[float]] = {key: [] for key in models}
    for _ in range(runs):
        for key, each in models.items():
            start = time.perf_counter()
            each(x, 500)
            times[key].append(time.perf_counter() - start)
    whole, integer = median(times["float32"]), median(times["int8"])
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{name}: {parameters:.1f}M parameters, batch {batch}, quantization noise {noise:.1e} of the signal")
    print(f"  median of {runs}: float32 {whole * 1e3:.0f} ms, int8 {integer * 1e3:.0f} ms, {whole / integer:.2f}x")
    print(f"  quickest:    float32 {min(times['float32']) * 1e3:.0f} ms, int8 {min(times['int8']) * 1e3:.0f} ms")
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            models["int8"](x, 500)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="also print the operators of one int8 pass")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    compare("small", small_unet(), options.batch, options.runs, options.profile)
    compare("cifar", cifar_unet(), options.batch, options.runs, options.profile)


if __name__ == "__main__":
    main()
