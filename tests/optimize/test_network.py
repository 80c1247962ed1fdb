from contextlib import contextmanager

import pytest
import torch

import stepquant
from stepquant.layers.quantized import quantized_modules
from stepquant.optimize.trainer import SAVE_EVERY, optimize
from stepquant.progress import Progress
from stepquant.workspace import Workspace


class Stop(Exception):
    """Stands for a kill."""


class StopIn(Progress):
    """Kills the run after some iterations of the task whose description starts with `name`."""

    def __init__(self, name: str, iterations: int) -> None:
        self.name, self.left = name, iterations

    @contextmanager
    def task(self, description: str, total: int):
        def advance(n: int) -> None:
            if description.startswith(self.name):
                self.left -= n
                if self.left < 0:
                    raise Stop

        yield advance


def minimise(workspace, iterations=2 * SAVE_EVERY, progress=None):
    torch.manual_seed(0)
    x = torch.zeros(3, requires_grad=True)

    def loss(iteration: int) -> torch.Tensor:
        noise = torch.randn(3, generator=torch.Generator().manual_seed(iteration))
        return (x - 1 + 0.1 * noise).square().sum()

    optimize(
        [{"params": [x], "lr": 0.1}],
        loss,
        iterations,
        workspace=workspace,
        stage="stage",
        description="Minimising",
        progress=progress or Progress(),
    )
    return x.detach()


def test_an_interrupted_minimisation_ends_in_the_same_bytes(tmp_path):
    whole = minimise(Workspace(tmp_path / "whole"))
    assert torch.allclose(whole, torch.ones(3), atol=0.05)
    with pytest.raises(Stop):
        minimise(Workspace(tmp_path / "killed"), progress=StopIn("Minimising", SAVE_EVERY + 10))
    assert torch.equal(minimise(Workspace(tmp_path / "killed")), whole)


def test_gradients_are_clipped_and_the_average_ships(tmp_path):
    def run(name, progress=None, **options):
        x = torch.zeros(2, requires_grad=True)
        seen = []

        def loss(iteration: int) -> torch.Tensor:
            seen.append(x.detach().clone())
            return (x * torch.tensor([1000.0, 0.0])).sum() if iteration % 2 else (x - 1).square().sum()

        optimize(
            [{"params": [x], "lr": 0.1}],
            loss,
            2 * SAVE_EVERY,
            workspace=Workspace(tmp_path / name),
            stage="stage",
            description="Minimising",
            progress=progress or Progress(),
            **options,
        )
        return x.detach(), seen

    free, _ = run("free")
    clipped, steps = run("clipped", clip_norm=1.0)
    assert abs(float(clipped[0] - 1)) < abs(float(free[0] - 1)), "the huge gradients no longer drown the others"
    averaged, same = run("averaged", clip_norm=1.0, ema_decay=0.9)
    assert torch.equal(torch.stack(steps), torch.stack(same)), "the average does not disturb the learning"
    expected = torch.zeros(2)
    for iteration, x in enumerate([*steps[1:], clipped]):
        expected.lerp_(x, 1 - min(0.9, (1 + iteration) / (10 + iteration)))
    assert torch.allclose(averaged, expected) and not torch.equal(averaged, clipped)
    with pytest.raises(Stop):
        run("killed", StopIn("Minimising", SAVE_EVERY + 10), clip_norm=1.0, ema_decay=0.9)
    assert torch.equal(run("killed", clip_norm=1.0, ema_decay=0.9)[0], averaged)


def quest(pipeline, workspace=None, progress=None, **arguments):
    return stepquant.quantize(
        pipeline,
        "w4a4",
        recipe="quest",
        calibration=stepquant.Calibration(samples=8, steps=4),
        workspace=workspace,
        progress=progress,
        **{"critical": "both", "rounding_iterations": 0, "time_iterations": 3, "iterations": 3, "weight_rate": 0.05}
        | arguments,
    )


def test_a_killed_alignment_continues_and_ends_in_the_same_integers(text_pipeline, tmp_path):
    whole = quest(text_pipeline, tmp_path / "whole").unet.state_dict()
    with pytest.raises(Stop):
        quest(text_pipeline, tmp_path / "killed", StopIn("Aligning critical", 1))
    continued = quest(text_pipeline, tmp_path / "killed").unet.state_dict()
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_alignment_trains_its_layers_and_no_others(text_pipeline):
    start = quantized_modules(quest(text_pipeline, time_iterations=0, iterations=0).unet)
    aligned = quantized_modules(quest(text_pipeline).unet)
    changed = {
        name for name in start if not torch.equal(start[name].layer().weight.codes, aligned[name].layer().weight.codes)
    }
    assert any("time_emb_proj" in name for name in changed)
    assert any(".ff." in name or ".to_" in name for name in changed)
    assert not any(name.endswith(("conv1", "conv2", "conv_in", "conv_out")) for name in changed)


def test_scales_per_step_have_a_row_for_every_calibrated_timestep(text_pipeline):
    layers = quantized_modules(quest(text_pipeline).unet).values()
    assert {layer.layer().input.rows for layer in layers if layer.layer().input} == {4}
    layers = quantized_modules(quest(text_pipeline, scales="shared").unet).values()
    assert {layer.layer().input.rows for layer in layers if layer.layer().input} == {1}


def test_network_training_brings_the_output_closer(text_pipeline):
    """The global loss alone, everything trained: the output's error on the calibration samples falls."""
    torch.manual_seed(0)
    x, text = torch.randn(6, 4, 8, 8), torch.randn(6, 16, text_pipeline.text_encoder.config.hidden_size)
    time = torch.tensor([1, 250, 251, 500, 501, 750])

    def output(unet):
        with torch.no_grad():
            return unet(x[:, :, : unet.config.sample_size, : unet.config.sample_size], time, text).sample

    target = output(text_pipeline.unet)

    def error(**arguments):
        return float((output(quest(text_pipeline, **arguments).unet) - target).square().mean())

    assert error(time_iterations=0, iterations=60, weight_rate=0.02, scale_rate=0.02) < error(
        time_iterations=0, iterations=0
    )
