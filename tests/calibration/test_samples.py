import torch

from stepquant.calibration.samples import CalibrationSet


def test_the_first_samples_keep_their_outputs():
    tensors = {"sample": torch.arange(5.0), "timestep": torch.arange(5)}
    first = CalibrationSet(tensors, torch.arange(5), outputs=torch.arange(5.0)).first(2)
    assert len(first) == len(first.outputs) == len(first.tensors["sample"]) == 2
