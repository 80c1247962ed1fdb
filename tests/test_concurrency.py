"""Several quantized pipelines at once: in threads, alternating step by step, and with many timesteps in one batch."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import stepquant
from stepquant.errors import StepquantError
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request

CALIBRATION = stepquant.Calibration(samples=6, steps=4)


@pytest.fixture(scope="module")
def quantized(text_pipeline):
    """Two quantizations of one pipeline, with per-step scales."""

    def make(bits: str):
        settings = {"critical": "attention", "rounding_iterations": 0, "time_iterations": 0, "iterations": 0}
        return stepquant.quantize(
            text_pipeline, bits, recipe="quest", calibration=CALIBRATION, hyperparameters=settings
        )

    return make("w4a4"), make("w8a8")


def test_pipelines_share_no_mutable_state(quantized, text_pipeline):
    pipelines = [*quantized, text_pipeline]
    assert len({id(pipeline.scheduler) for pipeline in pipelines}) == 3
    assert len({id(pipeline.unet) for pipeline in pipelines}) == 3


def test_threads_generate_the_same_images_as_one_thread(quantized, text_pipeline):
    pairs = zip((*quantized, text_pipeline), (5, 3, 4), strict=True)
    jobs = [(pipeline, steps, seed) for pipeline, steps in pairs for seed in (0, 7)]

    def images(job) -> torch.Tensor:
        pipeline, steps, seed = job
        return generate(pipeline, make_request(pipeline, steps), range(2), seed)

    alone = [images(job) for job in jobs]
    with ThreadPoolExecutor(3) as threads:
        for turn in (0, 1):  # one thread per pipeline
            together = list(threads.map(images, jobs[turn::2]))
            assert all(torch.equal(*pair) for pair in zip(alone[turn::2], together, strict=True))


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 4, 8, 8, generator=generator), torch.randn(4, 16, 16, generator=generator)


@torch.no_grad()
def test_alternating_steps_of_two_models(quantized):
    x, text = inputs(0)
    times = (750, 500, 250, 0)
    alone = [[pipeline.unet(x, time, text).sample for time in times] for pipeline in quantized]
    for index, time in enumerate(times):
        other = times[-1 - index]
        first = quantized[0].unet(x, time, text).sample
        second = quantized[1].unet(x, other, text).sample
        assert torch.equal(first, alone[0][index]) and torch.equal(second, alone[1][-1 - index])


@torch.no_grad()
def test_a_batch_of_mixed_timesteps_equals_single_samples(quantized):
    """Up to float rounding: with another batch size, kernels sum in another order."""
    x, text = inputs(1)
    times = torch.tensor([750, 0, 500, 750])
    for pipeline in quantized:
        mixed = pipeline.unet(x, times, text).sample
        for index, time in enumerate(times):
            alone = pipeline.unet(x[index : index + 1], time, text[index : index + 1]).sample
            error = (mixed[index] - alone[0]).square().mean().sqrt() / alone.square().mean().sqrt()
            assert error < 0.02  # a rounding error may cross the edge of a 4-bit code, a wrong row changes everything
        swapped = pipeline.unet(x, times.flip(0), text).sample
        assert (swapped[1] - mixed[1]).square().mean().sqrt() > 0.02 * mixed[1].square().mean().sqrt()


def test_calls_from_two_threads_are_rejected_and_the_pipeline_still_works(quantized):
    """The first call waits inside the denoiser until the second is rejected."""
    unet, (x, text) = quantized[0].unet, inputs(2)
    expected = unet(x, 500, text).sample
    inside, rejected = threading.Event(), threading.Event()

    def wait(*_args) -> None:
        inside.set()
        assert rejected.wait(60)

    handle = unet.mid_block.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(unet, x, 500, text)
        assert inside.wait(60)
        second = threads.submit(unet, x, 0, text)
        with pytest.raises(StepquantError, match=r"two threads at once.*copy\.deepcopy\(pipeline\)"):
            second.result(60)
        rejected.set()
        assert torch.equal(first.result(60).sample, expected)
        handle.remove()
        assert torch.equal(threads.submit(unet, x, 500, text).result(60).sample, expected)


def test_a_failed_call_releases_the_denoiser(quantized):
    unet, (x, text) = quantized[0].unet, inputs(3)
    with ThreadPoolExecutor(1) as threads:
        with pytest.raises((RuntimeError, StepquantError), match=r"must match the size|expected 16 channels"):
            threads.submit(unet, x, 500, text[:, :, :3]).result(60)
        unet(x, 500, text)


def test_a_pipeline_and_its_copy_run_at_the_same_time(quantized):
    pipelines = [quantized[0], copy.deepcopy(quantized[0])]
    request = make_request(pipelines[0], 4)
    alone = generate(pipelines[0], request, range(2), 3)
    with ThreadPoolExecutor(2) as threads:
        for images in threads.map(lambda pipeline: generate(pipeline, request, range(2), 3), pipelines):
            assert torch.equal(images, alone)
