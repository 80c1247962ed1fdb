import copy
from contextlib import contextmanager

import pytest
import torch

import stepquant
from stepquant import zoo
from stepquant.calibration.collection import collect
from stepquant.calibration.model import calibrate_ranges, insert_fake_quantizers
from stepquant.calibration.samples import Calibration
from stepquant.calibration.selection import uniform_steps
from stepquant.config import QuantSpec
from stepquant.layers.quantized import quantized_modules
from stepquant.loading import resolve_pipeline
from stepquant.models import denoiser_name
from stepquant.models.description import main_tensor
from stepquant.optimize.blocks import reconstruct
from stepquant.optimize.objectives import LayerOutputs, error
from stepquant.optimize.reconstruction import Reconstruction
from stepquant.optimize.replay import Replay
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.progress import Progress
from stepquant.quality.fidelity import psnr
from stepquant.workspace import Workspace
from tests.described import described

PIPELINES = ["unconditional_pipeline", "class_pipeline", "text_pipeline"]


def samples_of(pipeline, count=6):
    steps = uniform_steps(count, 3, torch.Generator().manual_seed(0))
    calibration = Calibration(samples=count, steps=3)
    denoiser = getattr(pipeline, denoiser_name(pipeline))
    return denoiser, collect(pipeline, denoiser, make_request(pipeline, 3), steps, calibration, 0, Progress())


@pytest.mark.parametrize("name", PIPELINES)
def test_replayed_inputs_and_outputs_equal_those_of_the_whole_network(name, request, tmp_path):
    denoiser, samples = samples_of(request.getfixturevalue(name))
    seen: dict[str, tuple] = {}
    blocks = described(denoiser).blocks
    handles = []
    for block in blocks:

        def keep(_module, args, kwargs, output, block=block):
            seen[block] = (args, kwargs, main_tensor(output))

        handles.append(denoiser.get_submodule(block).register_forward_hook(keep, with_kwargs=True))
    with torch.no_grad():
        denoiser(**samples.arguments(slice(0, len(samples))))
    for handle in handles:
        handle.remove()
    replay = Replay(denoiser, samples, 4, tmp_path)
    for block in blocks:
        inputs = replay.inputs(block)
        args, kwargs = inputs.at(slice(0, len(samples)))
        expected_args, expected_kwargs, expected = seen[block]
        for one, other in zip((*args, *kwargs.values()), (*expected_args, *expected_kwargs.values()), strict=True):
            if isinstance(other, torch.Tensor):
                assert torch.allclose(one, other, atol=1e-5), block
        assert torch.allclose(replay.run(block, inputs).at(slice(None)).block, expected, atol=1e-5), block
    assert all("forward" not in denoiser.get_submodule(block).__dict__ for block in blocks)


@pytest.mark.parametrize("name", PIPELINES)
def test_replayed_blocks_use_the_scales_of_each_timestep(name, request, tmp_path):
    """With per-step scales, a block uses the scale of each sample's timestep, as the network does."""
    denoiser, samples = samples_of(request.getfixturevalue(name))
    timesteps = samples.timesteps.unique()
    assert len(timesteps) == 3
    model = insert_fake_quantizers(denoiser, described(denoiser), QuantSpec(bits="w8a4"), timesteps=timesteps)
    calibrate_ranges(model, samples, "minmax", 4, Progress())
    for point in model.activation_points():
        point.set_grid(point.scale * torch.tensor([1.0, 4.0, 16.0])[:, None], point.zero_point)  # per-step
    blocks = described(denoiser).blocks
    with torch.no_grad(), LayerOutputs.recorded({"last": model.model.get_submodule(blocks[-1])}) as expected:
        model.model(**samples.arguments(slice(0, len(samples))))
    replay = Replay(model.model, samples, 5, tmp_path, model.clock)
    for block in blocks:
        output = replay.run(block, replay.inputs(block)).at(slice(None)).block
    assert torch.allclose(output, expected["last"], atol=1e-3)


def test_guided_sampling_yields_samples_with_and_without_the_condition(class_pipeline):
    _, samples = samples_of(class_pipeline, count=12)
    labels = samples.arguments(slice(None))["class_labels"].tolist()
    assert 1000 in labels and any(label < 10 for label in labels)


class Stop(Exception):
    """Simulates a kill."""


class StopAfter(Progress):
    def __init__(self, iterations: int) -> None:
        self.left = iterations

    @contextmanager
    def task(self, description: str, total: int):
        def advance(n: int) -> None:
            if description.startswith("Reconstructing"):
                self.left -= n
                if self.left < 0:
                    raise Stop

        yield advance


def quantize(pipeline, workspace, progress=None, **arguments):
    calibration = stepquant.Calibration(samples=8, steps=4)
    return stepquant.quantize(
        pipeline, "w4a8", recipe="q-diffusion", calibration=calibration, workspace=workspace, progress=progress,
        hyperparameters={"iterations": 3}, **arguments,
    )  # fmt: skip


def test_a_killed_run_continues_and_ends_in_the_same_bytes(unconditional_pipeline, tmp_path):
    whole = quantize(unconditional_pipeline, tmp_path / "whole")
    with pytest.raises(Stop):
        quantize(unconditional_pipeline, tmp_path / "killed", StopAfter(40))
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("block-*")}
    assert len(finished) >= 10, "blocks finished before the kill are stored"
    continued = quantize(unconditional_pipeline, tmp_path / "killed")
    assert all((tmp_path / "killed" / name).stat().st_mtime_ns == time for name, time in finished.items())
    for pipeline, folder in ((whole, "a"), (continued, "b")):
        pipeline.save_pretrained(tmp_path / folder)
    for path in sorted((tmp_path / "a").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path


def test_a_damaged_stage_is_computed_again(unconditional_pipeline, tmp_path):
    first = quantize(unconditional_pipeline, tmp_path)
    stage = sorted(tmp_path.glob("block-*"))[3]
    stage.write_bytes(stage.read_bytes()[:-20])
    second = quantize(unconditional_pipeline, tmp_path)
    states = [pipeline.unet.state_dict() for pipeline in (first, second)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_second_process_is_rejected(unconditional_pipeline, tmp_path):
    from stepquant.workspace import Workspace

    with Workspace(tmp_path), pytest.raises(stepquant.StepquantError, match="another process"):
        quantize(unconditional_pipeline, tmp_path)


def test_the_original_is_unchanged(unconditional_pipeline, tmp_path):
    before = copy.deepcopy(unconditional_pipeline.unet.state_dict())
    hooks = len(unconditional_pipeline.unet._forward_pre_hooks)
    quantize(unconditional_pipeline, tmp_path)
    after = unconditional_pipeline.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert len(unconditional_pipeline.unet._forward_pre_hooks) == hooks
    assert not quantized_modules(unconditional_pipeline.unet)


@pytest.mark.parametrize(("block_weight", "left_out"), [(0.0, 0), (1.0, 1)])
def test_the_last_layer_is_not_compared_if_the_error_of_the_block_counts(
    block_weight, left_out, unconditional_pipeline, tmp_path, monkeypatch
):
    """Otherwise a block of one layer would not train."""
    denoiser, samples = samples_of(unconditional_pipeline)
    model = insert_fake_quantizers(denoiser, described(denoiser), QuantSpec(bits="w4a8"))
    seen, losses = [], []

    def spy(outputs, targets, *weights):
        seen.append(set(targets.layers))
        loss = error(outputs, targets, *weights)
        losses.append(float(loss.detach()))
        return loss

    monkeypatch.setattr("stepquant.optimize.blocks.error", spy)
    blocks = ("down_blocks.0.resnets.0", "conv_out")
    settings = Reconstruction(iterations=1, block_weight=block_weight, layer_weight=1.0)
    with Workspace(tmp_path) as workspace:
        reconstruct(
            denoiser, model, blocks, samples, settings, workspace=workspace, key="", seed=0, batch_size=4,
            progress=Progress(),
        )  # fmt: skip
    layers = [list(model.layers_in(block)) for block in blocks]
    assert [len(names) for names in layers] == [3, 1]
    assert seen == [set(names[: len(names) - left_out]) for names in layers]
    assert all(loss > 0 for loss in losses)


@pytest.mark.skipif("fashion-ddpm" not in zoo.names(), reason="the reference models are not in this checkout")
def test_reconstruction_beats_minmax_on_a_real_model():
    """On held-out noise, the error of the output is a fraction of the baseline's, and images are much closer."""
    pipeline = resolve_pipeline("zoo:fashion-ddpm")
    denoiser, held_out = samples_of(pipeline, count=8)
    arguments, request = held_out.arguments(slice(0, 8)), make_request(pipeline, 10)
    calibration = stepquant.Calibration(samples=16, steps=10, trajectories=4)
    with torch.no_grad():
        target = denoiser(**arguments).sample
    images = generate(pipeline, request, range(3), 7)

    def quantized(recipe, **settings):
        return stepquant.quantize(
            pipeline, "w4a8", recipe=recipe, calibration=calibration, seed=5, hyperparameters=settings
        )

    def error(candidate):
        with torch.no_grad():
            return float((candidate.unet(**arguments).sample - target).square().mean())

    def decibels(candidate):
        return float(psnr(generate(candidate, request, range(3), 7), images).mean())

    reconstructed, baseline = quantized("q-diffusion", iterations=4), quantized("minmax")
    assert error(reconstructed) < 0.2 * error(baseline)
    assert decibels(reconstructed) > decibels(baseline) + 5
