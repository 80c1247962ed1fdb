import torch

from stepquant.calibration.samples import CalibrationSet
from stepquant.pipelines.recording import OUTPUT


def test_the_first_samples_keep_their_outputs():
    tensors = {"sample": torch.arange(5.0), "timestep": torch.arange(5), OUTPUT: torch.arange(5.0)}
    first = CalibrationSet.of(tensors, torch.arange(5)).first(2)
    every = slice(0, 2)
    assert len(first) == len(first.outputs(every)) == len(first.arguments(every)["sample"]) == 2
    assert OUTPUT not in first.arguments(every)
