"""Samples of every medium become one tensor."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import AudioPipelineOutput, ImagePipelineOutput
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from PIL import Image

from stepquant.errors import StepquantError
from stepquant.pipelines.outputs import samples_of


def test_images_and_frames_have_channels_first():
    images = np.random.default_rng(0).random((2, 4, 5, 3), dtype=np.float32)
    samples = samples_of(ImagePipelineOutput(images=images))
    assert samples.shape == (2, 3, 4, 5) and samples[1, 2, 3, 4] == pytest.approx(images[1, 3, 4, 2] * 2 - 1)
    frames = np.random.default_rng(0).random((2, 6, 4, 5, 3), dtype=np.float32)
    samples = samples_of(WanPipelineOutput(frames=frames))
    assert samples.shape == (2, 3, 6, 4, 5) and samples[1, 2, 0, 3, 4] == pytest.approx(frames[1, 0, 3, 4, 2] * 2 - 1)
    assert torch.equal(samples_of(WanPipelineOutput(frames=list(frames))), samples)


def test_pillow_images_are_scaled():
    images = [Image.new("RGB", (5, 4), (255, 0, 0)), Image.new("L", (5, 4), 255).convert("RGB")]
    samples = samples_of(ImagePipelineOutput(images=images))
    assert samples.shape == (2, 3, 4, 5)
    assert samples[0, :, 0, 0].tolist() == [1, -1, -1] and bool((samples[1] == 1).all())
    assert samples_of(ImagePipelineOutput(images=[Image.new("L", (5, 4))])).shape == (1, 1, 4, 5)


def test_audio_has_a_channel_and_its_own_scale():
    audio = np.linspace(-1, 1, 10, dtype=np.float32).reshape(2, 5)
    samples = samples_of(AudioPipelineOutput(audios=audio))
    assert samples.shape == (2, 1, 5) and torch.equal(samples[:, 0], torch.from_numpy(audio))
    assert samples_of(AudioPipelineOutput(audios=audio.reshape(1, 2, 5))).shape == (1, 2, 5)


def test_latents_and_embeddings_keep_their_shape():
    latents = torch.rand(2, 7, 3, dtype=torch.float64)
    assert torch.equal(samples_of(ImagePipelineOutput(images=latents)), latents.float())
    prior = namedtuple("Prior", ["image_embeds", "negative_image_embeds"])
    assert torch.equal(samples_of(prior(latents[:, :, 0].float(), None)), latents[:, :, 0].float())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([np.zeros((4, 4, 3)), np.zeros((5, 4, 3))], r"shapes \(4, 4, 3\) and \(5, 4, 3\); expected one shape"),
        ("mesh", "returned str; expected images, frames or audio"),
    ],
)
def test_what_is_not_a_tensor_is_refused(value, message):
    with pytest.raises(StepquantError, match=message):
        samples_of((value,))
