from contextlib import contextmanager

import pytest
import torch

import stepquant
from stepquant.layers.quantized import quantized_modules
from stepquant.progress import Progress


class Stop(Exception):
    """Simulates a kill."""


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


def quest(pipeline, workspace=None, progress=None, **arguments):
    return stepquant.quantize(
        pipeline,
        "w4a4",
        recipe="quest",
        calibration=stepquant.Calibration(samples=6, steps=4, trajectories=2),
        workspace=workspace,
        progress=progress,
        hyperparameters={
            "critical": "both",
            "rounding_iterations": 0,
            "time_iterations": 3,
            "iterations": 3,
            "weight_rate": 0.05,
        }
        | arguments,
    )


def test_a_killed_alignment_continues_to_the_same_integers(text_pipeline, tmp_path):
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
    """With only the global loss, the error of the output decreases."""
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
