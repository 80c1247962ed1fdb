import copy

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stepquant.errors import StepquantError
from stepquant.layers.clock import StepClock, timestep_name


@given(st.sets(st.integers(0, 999), min_size=1, max_size=30), st.floats(-10, 1100))
@settings(max_examples=100, deadline=None)
@pytest.mark.filterwarnings("ignore:timestep")
def test_row_of_the_nearest_timestep(grid, time):
    timesteps = sorted(grid)
    clock = StepClock(torch.tensor(timesteps))
    clock.set(time)
    distance = abs(timesteps[int(clock.row)] - time)
    assert distance <= min(abs(step - time) for step in timesteps) + 1e-3


def test_batches_of_one_and_of_several_timesteps():
    clock = StepClock(torch.tensor([0.0, 10.0, 20.0]))
    clock.set(torch.tensor([19, 19, 19]))
    assert clock.row.shape == () and clock.row == 2
    clock.set(torch.tensor([19, 0, 11]))
    assert clock.row.tolist() == [2, 0, 1]


@pytest.mark.parametrize("grid", [[], [1.0, 1.0], [2.0, 1.0], [float("nan")], [[1.0]]])
def test_bad_grids_are_refused(grid):
    with pytest.raises(ValueError, match="timesteps"):
        StepClock(torch.tensor(grid))


def test_denoiser_sets_its_clock_for_any_call_signature():
    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    clock = StepClock(torch.tensor([0.0, 500.0]))
    remove = clock.attach(model)
    x = torch.zeros(1, 1, 8, 8)
    model(x, 600)
    assert clock.row == 1
    model(sample=x, timestep=torch.tensor(3))
    assert clock.row == 0
    other = copy.deepcopy(model)
    other(x, 999)
    assert clock.row == 0, "a copy of the model has a clock of its own"
    remove()
    model(x, 999)
    assert clock.row == 0


@pytest.mark.parametrize("name", ["t", "timesteps", "timestep_ratio"])
def test_the_timestep_is_read_under_any_name_and_position(name):
    namespace: dict = {}
    exec(f"def forward(self, x, condition=None, {name}=None): return x", namespace)
    model = type("Denoiser", (nn.Module,), {"forward": namespace["forward"]})()
    assert timestep_name(model) == name
    clock = StepClock(torch.tensor([0.0, 0.5, 1.0]))
    clock.attach(model, name)
    model(torch.zeros(1), None, 0.9)
    assert clock.row == 2
    model(torch.zeros(1), **{name: torch.tensor([0.4, 0.1])})
    assert clock.row.tolist() == [1, 0]


def test_a_model_without_a_timestep_is_refused_with_the_names_that_are_known():
    with pytest.raises(StepquantError, match="Linear has the parameters input; expected a timestep named timestep, "):
        StepClock().attach(nn.Linear(1, 1))
    with pytest.raises(StepquantError, match="expected a timestep named time_left"):
        StepClock().attach(nn.Linear(1, 1), "time_left")


def test_the_latest_of_a_samples_timesteps_counts():
    """Image to video: the frames that are given have timestep 0."""
    clock = StepClock(torch.tensor([0.0, 500.0, 999.0]))
    clock.set(torch.tensor([[0.0, 999.0, 999.0], [0.0, 480.0, 480.0]]))
    assert clock.row.tolist() == [2, 1]
