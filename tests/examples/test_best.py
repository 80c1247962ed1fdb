from pathlib import Path

import pytest
import torch

import stepquant
from stepquant.layers.quantized import quantized_modules
from stepquant.recipes import find_class

BEST = find_class(f"{Path(__file__).parents[2] / 'examples' / 'best.py'}:Best")


@pytest.mark.parametrize(("bits", "intervals"), [("w4a8", "generator"), ("w4a4", "table")])
def test_the_example_recipe_combines_stages_of_the_papers(unconditional_pipeline, bits, intervals):
    quantized = stepquant.quantize(
        unconditional_pipeline,
        bits,
        recipe=BEST(intervals=intervals, iterations=2, finetuning=2),
        calibration=stepquant.Calibration(samples=12, steps=4),
    )
    modules = quantized_modules(quantized.unet).values()
    per_step = [module for module in modules if module.format.input and module.format.input.rows == 1000]
    assert len(per_step) == len(modules) - 1, "all inputs but that of the first layer have a row for every timestep"
    grids = {module.layer().input.zero_point.unique(dim=0).shape[0] for module in per_step}
    assert (max(grids) > 1) == (intervals == "table"), "a generator changes only the scale"
    assert any(module.format.transforms for module in modules) == (bits == "w4a4")
    with torch.no_grad():
        assert torch.isfinite(quantized.unet(torch.randn(2, 1, 16, 16), 500).sample).all()
