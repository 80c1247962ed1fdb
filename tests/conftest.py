"""Small pipelines of each kind, built from config with random weights; real classes, and quick."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, below

from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from stepquant import custom_model, quantizing
from tests.letters import letter_tokenizer

# The models are so small that a second thread costs more than it saves.
torch.set_num_threads(1)

# What most tests quantize has random weights and a handful of samples: the check of its quality would fail, search what
# is to blame, and take most of the time. Tests of the check use the fixture `quality_check`.
CHECKS = (quantizing.checked_pipeline, custom_model.checked_model)
quantizing.checked_pipeline = lambda pipeline, finished, *_: (pipeline, finished)
custom_model.checked_model = lambda finished, *_: finished

# A shell that runs this in the background makes it, and every process it starts, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def unconditional_pipeline() -> DDIMPipeline:
    """Unconditional pixels, [1, 16, 16]; never modify it, copy it."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
    )
    return DDIMPipeline(unet.eval(), DDIMScheduler())


@pytest.fixture(scope="session")
def class_pipeline() -> DiTPipeline:
    """Ten classes and guidance, [3, 16, 16] through an autoencoder; never modify it, copy it."""
    torch.manual_seed(1)
    transformer = DiTTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_embeds_ada_norm=1000,
    )
    names = {str(label): f"class {label}" for label in range(10)}
    return DiTPipeline(transformer.eval(), _autoencoder(), DDIMScheduler(), id2label=names)


@pytest.fixture(scope="session")
def text_pipeline(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    """Stable Diffusion in miniature, [3, 16, 16]; never modify it, copy it."""
    torch.manual_seed(2)
    tokenizer = letter_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def unconditional_folder(unconditional_pipeline: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`unconditional_pipeline` as a diffusers folder; never modify it, copy it."""
    return _saved(unconditional_pipeline, tmp_path_factory)


@pytest.fixture(scope="session")
def class_folder(class_pipeline: DiTPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`class_pipeline` as a diffusers folder; never modify it, copy it."""
    folder = _saved(class_pipeline, tmp_path_factory)
    # diffusers reads the names of the classes from the index, but does not write them there.
    index = json.loads((folder / "model_index.json").read_text())
    index["id2label"] = {str(label): name for name, label in class_pipeline.labels.items()}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session")
def text_folder(text_pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text_pipeline` as a diffusers folder; never modify it, copy it."""
    return _saved(text_pipeline, tmp_path_factory)


@pytest.fixture(scope="session")
def fragile_pipeline(unconditional_pipeline: DDIMPipeline) -> DDIMPipeline:
    """Rounding sets nearly all weights of ``up_blocks.1.resnets.1.conv2`` to 0: an input channel that is always zero
    has by far the largest. Never modify it, copy it."""
    pipeline = copy.copy(unconditional_pipeline)
    unet = copy.deepcopy(unconditional_pipeline.unet)
    block = unet.get_submodule("up_blocks.1.resnets.1")
    with torch.no_grad():
        block.norm2.weight[0] = block.norm2.bias[0] = 0
        block.conv2.weight *= 4  # so that much of the output is lost
        block.conv2.weight[:, 0] = 1000
    pipeline.register_modules(unet=unet)
    return pipeline


@pytest.fixture(scope="session")
def fragile_folder(fragile_pipeline: DDIMPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`fragile_pipeline` as a diffusers folder; never modify it, copy it."""
    return _saved(fragile_pipeline, tmp_path_factory)


@pytest.fixture
def quality_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantizing ends with the check."""
    pipelines, models = CHECKS
    monkeypatch.setattr(quantizing, "checked_pipeline", pipelines)
    monkeypatch.setattr(custom_model, "checked_model", models)


@pytest.fixture
def small_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are ranked for a budget on 8 samples, which are one batch, instead of 64."""
    from stepquant import Calibration

    monkeypatch.setattr("stepquant.recipes.sensitivity.RANKING", Calibration(samples=8, trajectories=4))


def _saved(pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "model"
    pipeline.save_pretrained(folder)
    return folder


def _autoencoder() -> AutoencoderKL:
    """4 latent channels at half the resolution of a 3-channel image."""
    return AutoencoderKL(
        sample_size=16,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
    ).eval()
