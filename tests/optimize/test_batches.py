from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from stepquant.calibration.collection import collect_all
from stepquant.calibration.image_folder import ImageFolder
from stepquant.calibration.samples import Calibration
from stepquant.distributed import Ranks
from stepquant.errors import StepquantError
from stepquant.optimize.batches import TrajectoryBatches, encode, image_batches
from stepquant.pipelines.request import make_request
from stepquant.progress import Progress


class ConstantImages(ImageFolder):
    """Constant images instead of files: image i has the value i / 10."""

    def read(self, indices):
        return torch.stack([torch.full((self.channels, *self.size), index / 10) for index in indices])


def folder(tmp_path, channels, conditions=()):
    paths = tuple(tmp_path / f"{index}.png" for index in range(4))
    return ConstantImages(tmp_path, paths, conditions, (16, 16), channels)


def make_batches(pipeline, denoiser, images, *, distill=False, size=40):
    return image_batches(
        pipeline,
        denoiser,
        images,
        lambda compute: compute()["latents"],
        size=size,
        distill=distill,
        progress=Progress(),
    )


def generator():
    return torch.Generator().manual_seed(0)


def test_images_are_noised_at_timesteps_stratified_over_training(unconditional_pipeline, tmp_path):
    pipeline = unconditional_pipeline
    batch = make_batches(pipeline, pipeline.unet, folder(tmp_path, 1))(0, generator(), Ranks())
    timestep = batch.arguments["timestep"]
    assert ((timestep * 40).div(1000, rounding_mode="floor") == torch.arange(40)).all(), "one in each stratum"
    alpha = pipeline.scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
    clean = (batch.arguments["sample"] - (1 - alpha).sqrt() * batch.target) / alpha.sqrt()
    early = timestep < 500  # later, dividing by alpha magnifies float32's rounding
    values = clean[early].mean(dim=(1, 2, 3))
    assert torch.allclose(clean[early], values.view(-1, 1, 1, 1).expand_as(clean[early]), atol=1e-4)
    assert set((values * 10).round().tolist()) <= {0, 1, 2, 3}
    again = make_batches(pipeline, pipeline.unet, folder(tmp_path, 1))(7, generator(), Ranks())
    assert torch.equal(again.arguments["sample"], batch.arguments["sample"]), "random only by the generator"


def test_targets_of_other_prediction_types(unconditional_pipeline, tmp_path):
    batches = make_batches(unconditional_pipeline, unconditional_pipeline.unet, folder(tmp_path, 1))
    noise = batches(0, generator(), Ranks()).target
    clean = replace(batches, prediction="sample")(0, generator(), Ranks()).target
    velocity = replace(batches, prediction="v_prediction")(0, generator(), Ranks())
    alpha = batches.alphas_cumprod[velocity.arguments["timestep"]].view(-1, 1, 1, 1)
    assert torch.allclose(velocity.target, alpha.sqrt() * noise - (1 - alpha).sqrt() * clean, atol=1e-6)
    distilled = make_batches(unconditional_pipeline, unconditional_pipeline.unet, folder(tmp_path, 1), distill=True)
    batch = distilled(0, generator(), Ranks())
    with torch.no_grad():
        assert torch.equal(batch.target, unconditional_pipeline.unet(**batch.arguments).sample)


def test_some_classes_are_dropped_and_latents_come_from_the_autoencoder(class_pipeline, tmp_path):
    images = folder(tmp_path, 3, (5, 6, 7, 8))
    batch = make_batches(class_pipeline, class_pipeline.transformer, images, size=400)(0, generator(), Ranks())
    labels = batch.arguments["class_labels"]
    assert set(labels.tolist()) == {5, 6, 7, 8, 1000}
    assert 20 <= int((labels == 1000).sum()) <= 60
    latents = encode(class_pipeline.vae, images, Progress())["latents"]
    with torch.no_grad():
        expected = class_pipeline.vae.encode(images.read(range(4))).latent_dist.mean
    assert torch.allclose(latents, expected * class_pipeline.vae.config.scaling_factor, atol=1e-5)
    assert batch.arguments["hidden_states"].shape == (400, 4, 8, 8)


def test_captions_are_embedded(text_pipeline, tmp_path):
    images = folder(tmp_path, 3, ("a", "b", "c", "d"))
    batches = make_batches(text_pipeline, text_pipeline.unet, images)
    embedded = batches.conditions(torch.tensor([2, -1]))["encoder_hidden_states"]
    with torch.no_grad():
        expected = text_pipeline.encode_prompt(["c", ""], "cpu", 1, False)[0]
    assert torch.equal(embedded, expected)
    assert batches(0, generator(), Ranks()).arguments["encoder_hidden_states"].shape == (40, *expected.shape[1:])


def test_a_sampler_without_a_noise_schedule_is_rejected(unconditional_pipeline, tmp_path):
    flow = SimpleNamespace(scheduler=SimpleNamespace(config=SimpleNamespace()))
    with pytest.raises(StepquantError, match="by distillation"):
        make_batches(flow, unconditional_pipeline.unet, folder(tmp_path, 1))


def test_trajectories_contain_full_precision_outputs_at_many_timesteps(class_pipeline):
    calibration = Calibration(samples=20, steps=4, trajectories=20)  # three batches
    request = make_request(class_pipeline, 4, guidance=4.0)
    collected = [
        collect_all(class_pipeline, class_pipeline.transformer, request, calibration, seed, Progress())
        for seed in (0, 0, 1)
    ]
    samples = collected[0]
    every = slice(None)
    assert torch.equal(samples.outputs(every), collected[1].outputs(every))
    assert not torch.equal(samples.steps, collected[2].steps)
    with torch.no_grad():
        outputs = class_pipeline.transformer(**samples.arguments(slice(0, 3))).sample
    assert torch.allclose(samples.outputs(slice(0, 3)), outputs, atol=1e-5)
    assert len(samples.timesteps.unique()) > 4, "each batch of trajectories takes another number of steps"
    labels = samples.arguments(every)["class_labels"].unique().tolist()
    assert 1000 in labels and len(labels) > 3, "both halves of guidance, and more classes than one batch has"

    requested = []

    def collect(index):
        requested.append(index)
        return samples

    batches = TrajectoryBatches(collect, refresh=10, size=5)
    batch = batches(9, generator(), Ranks())
    batches(25, generator(), Ranks())
    assert requested == [0, 2]
    row = next(
        row
        for row in range(len(samples))
        if torch.equal(samples.arguments(every)["hidden_states"][row], batch.arguments["hidden_states"][0])
    )
    assert torch.equal(batch.target[0], samples.outputs(every)[row])
