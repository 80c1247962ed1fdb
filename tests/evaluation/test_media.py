"""Video and audio are compared like images, as far as their values go."""

from __future__ import annotations

import pytest
import torch

import stepquant
from stepquant import evaluation
from stepquant.errors import StepquantError
from stepquant.evaluation.similarity import ssim
from stepquant.images import grid, stills
from stepquant.quality.fidelity import psnr, snr
from tests.families.registry import FAMILIES


def test_psnr_and_ssim_of_video_are_those_of_its_frames():
    torch.manual_seed(0)
    video = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    changed = (video + 0.1 * torch.randn(video.shape)).clamp(-1, 1)
    frames = [tensor.movedim(2, 1).reshape(10, 3, 16, 16) for tensor in (changed, video)]
    error = (changed - video).double().square().mean(dim=(1, 2, 3, 4))
    assert torch.allclose(psnr(changed, video), 10 * torch.log10(4 / error))
    assert torch.allclose(ssim(changed, video), ssim(*frames).reshape(2, 5).mean(dim=1))
    assert psnr(video[:1], video[:1]).tolist() == [100]


def test_the_signal_to_noise_ratio_of_audio_does_not_depend_on_its_scale():
    reference = torch.sin(torch.arange(100) / 5).reshape(1, 1, 100)
    noisy = reference + 0.1 * reference.roll(13, dims=-1)
    expected = 10 * torch.log10((reference.double() ** 2).sum() / ((noisy - reference).double() ** 2).sum())
    assert torch.allclose(snr(noisy, reference), expected)
    assert torch.allclose(snr(7 * noisy, 7 * reference), expected, atol=1e-5)


def test_a_grid_shows_the_middle_frame():
    video = torch.rand(2, 3, 5, 16, 16)
    assert torch.equal(stills(video), video[:, :, 2])
    assert grid(stills(video)).size[0] > 64
    with pytest.raises(StepquantError, match=r"zoo:sound generates samples of the shape \[1, 100\]; expected images"):
        stills(torch.zeros(2, 1, 100), "zoo:sound")


@pytest.mark.parametrize(
    ("name", "medium", "steps"), [("Wan 2.2 A14B", "video", 4), ("Stable Audio", "audio", 2)], ids=["video", "audio"]
)
def test_evaluation(name, medium, steps, tmp_path, monkeypatch):
    """Of two experts, each with half of the steps, and of audio."""
    monkeypatch.setattr("stepquant.evaluation.compare.peak_memory_bytes", lambda *_: 1)
    family = FAMILIES[name]
    pipeline = family.build(tmp_path)
    pipeline.save_pretrained(tmp_path / "full")
    arguments = {"prompts": family.prompts(pipeline), "inputs": dict(family.call)}
    quantized = stepquant.quantize(
        pipeline, "w8a8", recipe="minmax", calibration={"samples": 4, "steps": steps}, **arguments
    )
    quantized.save_pretrained(tmp_path / "quantized")
    evaluated = evaluation.evaluate(tmp_path / "quantized", str(tmp_path / "full"), count=2, steps=steps, **arguments)
    result = evaluated.result
    assert result.medium == medium and (result.ssim is None) == (medium == "audio")
    assert result.psnr_db > 20
    assert len(result.step_error) == steps and max(result.step_error) < 0.1
    assert result.denoiser_bytes < 0.6 * result.denoiser_bytes_fp32
    with pytest.raises(StepquantError, match=f"full generates {medium}. Leave out `metrics`"):
        evaluation.evaluate(
            tmp_path / "quantized", str(tmp_path / "full"), count=1, steps=steps, metrics={"lpips": str(tmp_path)},
            **arguments,
        )  # fmt: skip
