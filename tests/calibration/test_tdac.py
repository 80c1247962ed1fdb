import copy

import diffusers
import pytest
import tiny
import torch

import stepquant
from stepquant.calibration.tdac import dense_and_diverse_steps, density, distribute, diversity, step_features
from stepquant.errors import StepquantError
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.progress import Progress
from tests.described import described

MORE_CALLS = {
    "PNDM": (diffusers.PNDMScheduler(skip_prk_steps=True), 5),
    "Heun": (diffusers.HeunDiscreteScheduler(), 7),
}
"""Samplers, and how often four of their steps call the denoiser."""


def with_scheduler(pipeline, scheduler):
    pipeline = copy.copy(pipeline)
    pipeline.scheduler = scheduler
    return pipeline


def features_of(pipeline, denoiser, request):
    """What `step_features` makes of two images, and the middle's output at each call."""
    middle = denoiser.get_submodule(described(denoiser).middle)
    seen = []
    handle = middle.register_forward_hook(lambda _module, _inputs, output: seen.append(output.flatten(2).mT))
    found = step_features(pipeline, denoiser, middle, request, 2, 0, Progress())
    handle.remove()
    return found, seen


def features(steps=12):
    torch.manual_seed(0)
    base = torch.randn(1, 2, 5, 8)
    out = base + 0.01 * torch.randn(steps, 2, 5, 8)  # alike,
    out[3] = torch.randn(2, 5, 8) * 3  # but for two
    out[7] = torch.randn(2, 5, 8) * 3
    return out


def test_density_counts_neighbours_and_diversity_sums_cosine_distances():
    values = features()
    assert float(density(values)[[3, 7]].max()) == 0
    expected = torch.zeros(12)
    for i in range(12):
        for j in range(12):
            if i != j:
                expected[i] += (1 - torch.cosine_similarity(values[i], values[j], dim=-1)).mean()
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    assert torch.allclose(diversity(values), expected, atol=1e-4)
    assert set(diversity(values).topk(2).indices.tolist()) == {3, 7}


@pytest.mark.parametrize("radius", [0.3, 3.0])
def test_density_and_weights_within_a_published_radius(radius):
    """The paper's double loop: mean squared distances, cosines over channels, ``w = D + lambda V``."""
    torch.manual_seed(0)
    values = torch.randn(9, 2, 5, 8) * torch.linspace(0.1, 2, 9)[:, None, None, None]
    dense, diverse = torch.zeros(9), torch.zeros(9)
    for i in range(9):
        for j in range(9):
            if i != j:
                dense[i] += float((values[i] - values[j]).square().mean()) <= radius
                diverse[i] += (1 - torch.cosine_similarity(values[i], values[j], dim=-1)).sum()
    dense, diverse = ((x - x.min()) / (x.max() - x.min()) for x in (dense, diverse))
    assert torch.allclose(density(values, radius=radius), dense)
    weights = dense + 1.2 * diverse
    steps = dense_and_diverse_steps(values, 400, torch.Generator().manual_seed(0), 1.2, radius=radius)
    counts = torch.bincount(steps, minlength=9)
    assert float((counts - 400 * weights / weights.sum()).abs().max()) < 1


@pytest.mark.parametrize("samples", [12, 13, 100, 1024])
def test_distributed_samples_sum_up_and_are_within_one_of_their_share(samples):
    weights = torch.rand(12, generator=torch.Generator().manual_seed(1))
    counts = distribute(weights, samples)
    assert int(counts.sum()) == samples
    assert float((counts - weights / weights.sum() * samples).abs().max()) < 1
    assert int(distribute(torch.zeros(5), 7).sum()) == 7


def test_a_larger_diversity_weight_selects_more_unusual_steps():
    def of(weight):
        steps = dense_and_diverse_steps(features(), 240, torch.Generator().manual_seed(0), weight)
        assert len(steps) == 240
        return int(((steps == 3) | (steps == 7)).sum())

    assert of(5.0) > of(0.2)


def test_too_few_samples():
    with pytest.raises(StepquantError, match="at least one sample per step"):
        dense_and_diverse_steps(features(), 5, torch.Generator())


@pytest.mark.parametrize("name", MORE_CALLS)
def test_several_calls_at_one_timestep_are_one_step(name, text_pipeline):
    """The features of a step are the mean over its calls, which are those at one timestep."""
    scheduler, calls = MORE_CALLS[name]
    pipeline = with_scheduler(text_pipeline, scheduler)
    found, seen = features_of(pipeline, pipeline.unet, make_request(pipeline, 4))
    assert len(seen) == calls and len(found) == 4
    times = pipeline.scheduler.timesteps.tolist()
    assert len(times) == calls
    for step, time in enumerate(dict.fromkeys(times)):
        together = [features for features, at in zip(seen, times, strict=True) if at == time]
        torch.testing.assert_close(found[step], sum(together) / len(together))


def test_separate_guidance_passes_are_one_step(text_pipeline):
    request = make_request(text_pipeline, 4, guidance=5.0)
    together, _ = features_of(text_pipeline, text_pipeline.unet, request)
    pipeline = copy.copy(text_pipeline)
    pipeline.unet = tiny.HalvesApart(text_pipeline.unet)
    apart, seen = features_of(pipeline, text_pipeline.unet, request)
    assert len(seen) == 8 and len(apart) == 4
    torch.testing.assert_close(apart, together.unflatten(1, (2, 2)).mean(dim=1))


def test_one_call_per_step(text_pipeline):
    found, seen = features_of(text_pipeline, text_pipeline.unet, make_request(text_pipeline, 4))
    assert torch.equal(found, torch.stack(seen))


@pytest.mark.parametrize("name", MORE_CALLS)
def test_eda_dm_with_samplers_of_several_calls(name, text_pipeline):
    pipeline = with_scheduler(text_pipeline, MORE_CALLS[name][0])
    calibration = stepquant.Calibration(samples=8, steps=4)
    quantized = stepquant.quantize(
        pipeline, "w4a8", recipe="eda-dm", calibration=calibration, hyperparameters={"iterations": 1}
    )
    assert torch.isfinite(generate(quantized, make_request(quantized, 4), [0], 0)).all()


def test_features_of_a_pipeline_that_takes_one_image_at_a_time(unconditional_pipeline):
    class OneImage(diffusers.DDIMPipeline):
        @torch.no_grad()
        def __call__(self, generator=None, num_inference_steps=50, output_type="np"):
            return super().__call__(1, generator, num_inference_steps=num_inference_steps, output_type=output_type)

    single = OneImage(unconditional_pipeline.unet, unconditional_pipeline.scheduler)
    single.set_progress_bar_config(disable=True)
    found, seen = features_of(single, single.unet, make_request(single, 4))
    assert found.shape[:2] == (4, 2) and len(seen) == 8
    torch.testing.assert_close(found, torch.cat([torch.stack(seen[:4]), torch.stack(seen[4:])], dim=1))
