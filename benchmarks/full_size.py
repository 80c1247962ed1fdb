"""Stable Diffusion 1.5 at full size, from config with random weights: quantized, saved, loaded and drawn with.

    python benchmarks/full_size.py                     # 860 M parameters
    python benchmarks/full_size.py --scale tiny        # the same with 3 M, to see that it works

What is measured is whether all of it works at that size, how long each stage takes and how much memory; the weights are
untrained, so the pictures show nothing. Appends a line to ``benchmarks/results/full_size.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import stepquant
from stepquant.cli.options import progress
from stepquant.evaluation.cost import folder_bytes, own_peak_bytes
from stepquant.pipelines import draw, make_request

RESULTS = Path(__file__).with_name("results") / "full_size.jsonl"
START, END = "<|startoftext|>", "<|endoftext|>"
SCALES: dict[str, dict[str, Any]] = {
    "full": {"unet": {}, "vae": (128, 256, 512, 512), "text": (768, 3072, 12, 12), "size": 512},
    "tiny": {
        "unet": {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32, "attention_head_dim": 4},
        "vae": (32, 32, 32, 32),
        "text": (32, 64, 1, 2),
        "size": 128,
    },
}


def build(scale: dict[str, Any], folder: Path) -> Any:
    """The pipeline of Stable Diffusion 1.5, with a tokenizer that knows single letters."""
    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [START, END, *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    width, inner, layers, heads = scale["text"]
    text = CLIPTextConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        projection_dim=width, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    unet = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8} | scale["unet"]
    vae = diffusers.AutoencoderKL(
        sample_size=512, block_out_channels=scale["vae"], layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=CLIPTextModel(text).eval(), tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(**unet).eval(),
        scheduler=diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                          clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--recipe", default="pqd")
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="of the calibration trajectories, and of the picture")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--calibration-size", type=int, default=256, help="pixels of the calibration pictures")
    arguments = parser.parse_args()
    scale = SCALES[arguments.scale]
    seconds: dict[str, float] = {}
    peak: dict[str, int] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        print(name, flush=True)
        start = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - start, 1)
        peak[name] = own_peak_bytes()
        print(f"    {seconds[name]} s, peak memory so far {peak[name] / 1e9:.2f} GB", flush=True)

    diffusers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with stage("build"):
            pipeline = build(scale, folder)
        parameters = sum(parameter.numel() for parameter in pipeline.unet.parameters())
        print(f"    UNet of {parameters / 1e6:.1f} M parameters")
        calibration = stepquant.Calibration(
            samples=arguments.samples, steps=arguments.steps, trajectories=1, batch_size=1,
            size=min(arguments.calibration_size, scale["size"]),
        )  # fmt: skip
        with stage("quantize"):
            quantized = stepquant.quantize(
                pipeline, arguments.bits, recipe=arguments.recipe, calibration=calibration, prompts=["a red bicycle"],
                iterations=arguments.iterations, batch_size=1, workspace=folder / "work", progress=progress(),
            )  # fmt: skip
        with stage("save"):
            quantized.save_pretrained(folder / "model")
        stored = folder_bytes(folder / "model" / "unet")
        del quantized, pipeline
        with stage("load"):
            loaded = diffusers.DiffusionPipeline.from_pretrained(folder / "model")
        with stage("draw"):
            request = make_request(loaded, arguments.steps, prompts=["a red bicycle"], size=scale["size"])
            picture = draw(loaded, request, [0], 0)
        assert picture.shape == (1, 3, scale["size"], scale["size"]) and bool(torch.isfinite(picture).all())
    line = {
        "arguments": vars(arguments),
        "parameters": parameters,
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "unet_bytes": stored,
        "of_float32": round(stored / 4 / parameters, 4),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {"stepquant": stepquant.__version__, "torch": torch.__version__.partition("+")[0],
                     "diffusers": diffusers.__version__, "python": platform.python_version()},
    }  # fmt: skip
    print(json.dumps(line, indent=2))
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
