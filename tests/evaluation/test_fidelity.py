from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from stepquant.errors import StepquantError
from stepquant.evaluation.similarity import ssim
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.quality.fidelity import HIGHEST_PSNR, Shadow, psnr


def test_psnr_is_per_image_over_a_range_of_two():
    reference = torch.zeros(2, 1, 4, 4)
    images = torch.stack([torch.full((1, 4, 4), 0.02), torch.full((1, 4, 4), -0.2)])
    expected = [20 * math.log10(2 / 0.02), 20 * math.log10(2 / 0.2)]
    assert psnr(images, reference).tolist() == pytest.approx(expected, abs=1e-4)


def test_identical_images_have_the_highest_psnr():
    images = torch.rand(3, 1, 4, 4)
    assert psnr(images, images).tolist() == [HIGHEST_PSNR] * 3


def test_ssim_is_one_for_identical_images_and_falls_with_noise():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    noise = torch.randn(2, 3, 16, 16, generator=generator)
    values = [float(ssim(images + amount * noise, images).mean()) for amount in (0.0, 0.1, 0.5)]
    assert values[0] == pytest.approx(1)
    assert values[0] > values[1] > values[2]


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_agree_with_scikit_image(channels):
    generator = torch.Generator().manual_seed(1)
    reference = torch.rand(2, channels, 24, 20, generator=generator) * 2 - 1
    images = (reference + 0.2 * torch.randn(reference.shape, generator=generator)).clamp(-1, 1)
    similarity, decibels = ssim(images, reference), psnr(images, reference)
    for index in range(2):
        ours, theirs = (side[index].double().permute(1, 2, 0).numpy() for side in (images, reference))
        # scikit-image leaves out half a window at the borders: pad them, so that the whole image counts.
        padded = [np.pad(side, ((5, 5), (5, 5), (0, 0)), mode="reflect") for side in (theirs, ours)]
        settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        expected = structural_similarity(*padded, data_range=2.0, channel_axis=2, **settings)
        assert float(similarity[index]) == pytest.approx(expected, abs=1e-9)
        assert float(decibels[index]) == pytest.approx(peak_signal_noise_ratio(theirs, ours, data_range=2.0), abs=1e-9)


def test_images_of_other_sizes_are_rejected():
    images = torch.zeros(2, 1, 16, 16)
    for metric in (psnr, ssim):
        with pytest.raises(StepquantError, match="cannot be compared"):
            metric(images, torch.zeros(2, 1, 16, 8))
    with pytest.raises(StepquantError, match="11 x 11"):
        ssim(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))


class _Scaled(nn.Module):
    """A denoiser whose output is off by a known factor."""

    def __init__(self, denoiser: nn.Module, factor: float) -> None:
        super().__init__()
        self.denoiser, self.factor, self.calls = denoiser, factor, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return (self.denoiser(*args, **kwargs)[0] * self.factor,)


@pytest.mark.parametrize("kind", ["unconditional", "class", "text"])
def test_step_error_of_a_known_distortion(kind, request):
    pipeline = request.getfixturevalue(f"{kind}_pipeline")
    component = "transformer" if kind == "class" else "unet"
    denoiser = getattr(pipeline, component)
    distorted = _Scaled(copy.deepcopy(denoiser), 1.25)
    generation = make_request(pipeline, 3, prompts=["a b"] if kind == "text" else None)
    alone = generate(pipeline, generation, range(2), 0)

    shadow = Shadow(denoiser, distorted)
    for batch in (range(2), range(2, 3)):
        with shadow:
            drawn = generate(pipeline, generation, batch, 0)
        if batch.start == 0:
            assert torch.equal(drawn, alone), "the trajectory is no longer the full-precision one"
    assert shadow.step_error == pytest.approx([0.25] * 3, rel=1e-4)
    assert all(seconds > 0 for seconds in shadow.seconds)

    generate(pipeline, generation, range(2), 0)
    assert distorted.calls == 6, "the shadow ran outside its context"


class Scaled(nn.Module):
    """Scales its sample and adds a residual, which it takes out of a list as UNets do those of a T2I-Adapter."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, sample, timestep, residuals):
        return (self.scale * sample + residuals.pop(0),)


def test_calls_of_a_step_may_differ_in_batch_size_and_take_entries_out_of_lists():
    reference = Scaled(1.0)
    with Shadow(reference, Scaled(1.1)) as shadow:
        for timestep in (2, 1):
            reference(torch.ones(2, 4), timestep, [torch.zeros(2, 4)])
            reference(torch.ones(1, 4), timestep, [torch.zeros(1, 4)])
    assert shadow.step_error == pytest.approx([0.1, 0.1])
    assert all(seconds > 0 for seconds in shadow.seconds)
