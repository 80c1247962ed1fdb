"""Stable Diffusion 1.5 at full size with random weights: quantize, save, load and generate.

    python benchmarks/full_size.py                     # 860 M parameters: 20 minutes on one core, 12 GB
    python benchmarks/full_size.py --dtype bfloat16    # the weights in half the memory
    python benchmarks/full_size.py --scale quarter     # 215 M parameters
    python benchmarks/full_size.py --recipe minmax --dtype bfloat16 --calibration-size 256      # minutes
    python benchmarks/full_size.py --scale tiny        # 3 M parameters, to test the script

The script checks that everything works at that size, and compares the duration and memory of each stage with the plan.
The weights are untrained, so that the images are noise. ``--json benchmarks/results/full-size.json`` stores the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import stepquant
from stepquant.evaluation.cost import folder_bytes
from stepquant.memory import peak_resident_bytes
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.progress import Progress
from stepquant.recipes import RECIPES

START, END = "<|startoftext|>", "<|endoftext|>"
SCALES: dict[str, dict[str, Any]] = {
    "full": {"unet": {}, "vae": (128, 256, 512, 512), "text": (768, 3072, 12, 12), "size": 512},
    "quarter": {
        "unet": {"block_out_channels": (160, 320, 640, 640), "cross_attention_dim": 384},
        "vae": (64, 128, 256, 256),
        "text": (384, 1536, 12, 6),
        "size": 512,
    },
    "tiny": {
        "unet": {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 32, "attention_head_dim": 4},
        "vae": (32, 32, 32, 32),
        "text": (32, 64, 1, 2),
        "size": 128,
    },
}


def build(scale: dict[str, Any], folder: Path) -> Any:
    """Build the pipeline of Stable Diffusion 1.5, with a tokenizer of single letters."""
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


def use(pipeline: Any, size: int) -> None:
    """Use a negative prompt, two images per prompt, a callback, and other schedulers than the calibration."""
    steps: list[int] = []

    def record(_pipeline: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return values

    for kind in (diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.PNDMScheduler):
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
        steps.clear()
        latents = pipeline(
            "a red bicycle", negative_prompt="rain", num_images_per_prompt=2, num_inference_steps=4, height=size,
            width=size, callback_on_step_end=record, output_type="latent",
        ).images  # fmt: skip
        assert latents.shape == (2, 4, size // 8, size // 8) and bool(torch.isfinite(latents).all())
        assert steps == list(range(len(pipeline.scheduler.timesteps))), "the callback sees every step"


class Stages(Progress):
    """Records the seconds of each stage, and the peak memory of the process at its end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self.made: Any = None

    def plan(self, make: Callable[[], object]) -> None:
        with self.task("plan"):
            self.made = make()
            print(f"    {self.made}")

    @contextmanager
    def task(self, description: str, total: int = 1) -> Iterator[Callable[[int], None]]:
        print(description, flush=True)
        start = time.perf_counter()
        yield lambda _: None
        self.seconds[description] = round(time.perf_counter() - start, 1)
        self.peak[description] = peak_resident_bytes()
        print(f"    {self.seconds[description]} s, peak {self.peak[description] / 1e9:.2f} GB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scale", choices=SCALES, default="full")
    parser.add_argument("--recipe", default="pqd")
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="steps of the calibration trajectories, and of the image")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--calibration-size", type=int, default=512, help="pixels of the calibration images")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    scale = SCALES[arguments.scale]
    stages = Stages()
    prompts = ["a red bicycle"]
    diffusers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with stages.task("build"):
            pipeline = build(scale, folder).to(getattr(torch, arguments.dtype))
        parameters = sum(parameter.numel() for parameter in pipeline.unet.parameters())
        print(f"    UNet of {parameters / 1e6:.1f} M parameters")
        calibration = stepquant.Calibration(
            samples=arguments.samples, steps=arguments.steps, trajectories=1,
            size=min(arguments.calibration_size, scale["size"]),
        )  # fmt: skip
        wanted = {"iterations": arguments.iterations, "batch_size": arguments.samples}
        kind = RECIPES[arguments.recipe]
        recipe = kind(**{name: value for name, value in wanted.items() if name in kind.fields()})
        with stages.task("quantize"):
            quantized = stepquant.quantize(
                pipeline, arguments.bits, recipe=recipe, calibration=calibration, prompts=prompts,
                workspace=folder / "work", progress=stages,
            )  # fmt: skip
        with stages.task("save"):
            quantized.save_pretrained(folder / "model")
        stored = folder_bytes(folder / "model" / "unet")
        del quantized, pipeline
        with stages.task("load"):
            dtype = getattr(torch, arguments.dtype)
            loaded = diffusers.DiffusionPipeline.from_pretrained(folder / "model", torch_dtype=dtype)
        with stages.task("generate"):
            request = make_request(loaded, arguments.steps, prompts=prompts, size=scale["size"])
            image = generate(loaded, request, [0], 0)
        assert image.shape == (1, 3, scale["size"], scale["size"]) and bool(torch.isfinite(image).all())
        with stages.task("use"):
            use(loaded, scale["size"] // 2)
    figures = {
        "arguments": {name: value for name, value in vars(arguments).items() if name != "json"},
        "parameters": parameters,
        "plan": dataclasses.asdict(stages.made),
        "seconds": stages.seconds,
        "peak_memory_bytes": stages.peak,
        "unet_bytes": stored,
        "of_float32": round(stored / 4 / parameters, 4),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {"stepquant": stepquant.__version__, "torch": torch.__version__.partition("+")[0],
                     "diffusers": diffusers.__version__, "python": platform.python_version()},
    }  # fmt: skip
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
