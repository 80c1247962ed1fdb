"""Calibration samples show the denoiser every condition, with and without guidance's condition."""

from __future__ import annotations

import pytest
import torch

from stepquant.calibration.collection import collect
from stepquant.calibration.samples import Calibration
from stepquant.pipelines.recording import record_calls
from stepquant.pipelines.request import make_request
from stepquant.progress import Progress


@pytest.mark.parametrize("prompts", [["a"], ["a", "bb"], ["a", "bb", "a b"]])
def test_every_prompt_is_seen_with_and_without_its_condition(prompts, text_pipeline):
    """Even where each image gives one sample only, and an even number of prompts is used in turn."""
    request = make_request(text_pipeline, 2, prompts=prompts)
    count = 4 * len(prompts)
    steps, calibration = torch.arange(count) % 2, Calibration(samples=count, steps=2)
    samples = collect(text_pipeline, text_pipeline.unet, request, steps, calibration, 0, Progress())
    seen = torch.cat([bucket.tensors["encoder_hidden_states"] for bucket in samples.buckets])
    for index in range(len(prompts)):
        unconditional, conditional = record_calls(text_pipeline, "unet", request, [index], 0)[0].arguments[
            "encoder_hidden_states"
        ]
        for expected in (unconditional, conditional):
            assert any(torch.allclose(row, expected, atol=1e-5) for row in seen)
