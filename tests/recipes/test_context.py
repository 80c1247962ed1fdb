"""Keys of stored samples, and the initial noise of calibration images."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

import stepquant
from stepquant.calibration import collection as calibration_samples
from stepquant.errors import StepquantError
from stepquant.models import denoiser_name
from stepquant.pipelines.request import make_request
from stepquant.recipes import Context, State
from stepquant.recipes.sensitivity import output_correction
from stepquant.recipes.stages import AddQuantizers, CollectSamples, Smooth
from stepquant.recipes.stages.samples import collect_samples, trajectories
from stepquant.workspace import Workspace

CALIBRATION = stepquant.Calibration(samples=8, steps=4)


def context(pipeline, folder, inputs=None, calibration=CALIBRATION):
    request = make_request(pipeline, calibration.steps)
    object.__setattr__(request, "inputs", inputs or {})
    spec = stepquant.QuantSpec.parse("w4a4")
    return Context(pipeline, denoiser_name(pipeline), spec, calibration, request, 0, Workspace(folder))


def test_the_key_of_samples_depends_on_the_contents_of_inputs(unconditional_pipeline, tmp_path):
    def key(value):
        return context(unconditional_pipeline, tmp_path, {"image": value}).sampling_key

    masks = np.zeros((2, 64, 64))
    masks[1, 32, 32] = 1
    assert key(masks[0]) != key(masks[1])
    assert key([Image.fromarray(masks[0])]) == key([Image.fromarray(masks[0])])


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_the_key_of_samples_depends_on_the_weights_of_every_model(part, text_pipeline, tmp_path):
    pipeline, changed = copy.copy(text_pipeline), copy.deepcopy(getattr(text_pipeline, part))
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1
    pipeline.register_modules(**{part: changed})
    assert context(pipeline, tmp_path).sampling_key != context(text_pipeline, tmp_path).sampling_key
    assert context(copy.copy(text_pipeline), tmp_path).sampling_key == context(text_pipeline, tmp_path).sampling_key


def test_a_correction_is_estimated_on_separate_images(unconditional_pipeline, tmp_path, monkeypatch):
    """Compares the seeds of their initial noise; CPU generators use 32 bits of them."""
    seeds = []
    generate = calibration_samples.generate

    def spy(pipeline, request, indices, seed, **arguments):
        seeds.extend((seed + index) % 2**32 for index in indices)
        return generate(pipeline, request, indices, seed, **arguments)

    monkeypatch.setattr(calibration_samples, "generate", spy)
    monkeypatch.setattr("stepquant.recipes.sensitivity.estimate_correction", lambda *_: None)
    one = context(unconditional_pipeline, tmp_path)
    collect_samples(one, torch.arange(4))
    trajectories(one, 0)
    trajectories(one, 1)
    output_correction(one, None)
    assert len(seeds) == 4 * 8
    assert len(set(seeds)) == len(seeds)


def test_smoothing_does_not_depend_on_earlier_runs(unconditional_pipeline, tmp_path, monkeypatch):
    """In the same workspace, with and without split skip connections."""
    monkeypatch.setattr("stepquant.calibration.smoothing.KEPT_COLUMNS", 32)
    monkeypatch.setattr("stepquant.calibration.smoothing.RANGES", 4)

    def factors(folder, *, split_skips):
        state = State()
        for stage in (CollectSamples(), AddQuantizers(weight_range="minmax", split_skips=split_skips), Smooth(below=8)):
            stage.run(context(unconditional_pipeline, folder), state)
        found = {name: layer.weight_point.smoothing for name, layer in state.model.layers.items()}
        return {name: smoothing for name, smoothing in found.items() if smoothing is not None}

    fresh = factors(tmp_path / "fresh", split_skips=True)
    whole = factors(tmp_path / "used", split_skips=False)
    after = factors(tmp_path / "used", split_skips=True)
    assert fresh.keys() == after.keys() and all(torch.equal(fresh[name], after[name]) for name in fresh)
    assert any(name not in whole or not torch.equal(fresh[name], whole[name]) for name in fresh)


def test_too_few_samples_to_select_are_rejected_before_sampling(unconditional_pipeline, monkeypatch):
    monkeypatch.setattr("stepquant.recipes.stages.samples.step_features", lambda *_: pytest.fail("sampling ran"))
    monkeypatch.setattr("stepquant.recipes.stages.samples.collect", lambda *_, **__: pytest.fail("sampling ran"))
    few = stepquant.Calibration(samples=3, steps=4)
    with pytest.raises(StepquantError, match="3 calibration samples over 4 steps are too few"):
        stepquant.quantize(unconditional_pipeline, "w4a4", recipe="eda-dm", calibration=few)
