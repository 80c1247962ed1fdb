"""The published algorithms, piece by piece, against independent references."""

import numpy as np
import pytest
import torch
from torch import nn

from stepquant.calibration.collection import collect
from stepquant.calibration.fake_quant.activation_quantizers import QDrop
from stepquant.calibration.fake_quant.layers import wrap
from stepquant.calibration.model import CalibrationModel, calibrate_ranges, insert_fake_quantizers
from stepquant.calibration.samples import Calibration, CalibrationSet
from stepquant.calibration.selection import uniform_steps
from stepquant.config import QuantSpec
from stepquant.core.noise import SampleNoise
from stepquant.distributed import Ranks
from stepquant.layers.clock import StepClock
from stepquant.models import describe
from stepquant.optimize.block import Block
from stepquant.optimize.blocks import _learn
from stepquant.optimize.network import Finetuning, _parameters, finetune, network_error
from stepquant.optimize.objectives import LayerOutputs
from stepquant.optimize.reconstruction import AdaRound, Reconstruction
from stepquant.optimize.replay import BlockOutputs, SampleValues
from stepquant.optimize.temporal import reconstruct_time_layers, temporal_block
from stepquant.pipelines.request import make_request
from stepquant.progress import Progress
from stepquant.workspace import Workspace

COUNT, BATCH, SEED = 12, 5, 7


def block_of_one_linear():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 4)
    layer.weight.data, layer.bias.data = torch.randn(4, 6, generator=generator), torch.zeros(4)
    x = torch.randn(COUNT, 6, generator=generator)
    calibrated = wrap(layer, 4, None, StepClock(), weight_range="minmax")
    whole, copy = nn.ModuleDict({"block": layer}), nn.ModuleDict({"block": calibrated})
    inputs = SampleValues.of(((x,), {}), COUNT)
    samples = CalibrationSet.of({"timestep": torch.zeros(COUNT)}, torch.zeros(COUNT, dtype=torch.long))
    model = CalibrationModel(copy, StepClock(), {"block": calibrated}, {})
    return Block("block", whole, model, inputs, inputs, samples, COUNT, Ranks()), layer, x, calibrated


def test_adaround_learns_as_in_numpy():
    """Adam at a constant rate on ``|Wx - W~x|^2 + lambda sum(1 - |2h - 1|^beta)``; at the end ``h = (v >= 0)``."""
    block, layer, x, calibrated = block_of_one_linear()
    rounding = AdaRound(rate=0.05, regularizer=0.01, published=True, decay=False)
    settings = Reconstruction(iterations=40, batch_size=BATCH, rounding=rounding, scales=None, drop_probability=0.0)
    scale, zero_point = (
        values[0].double().numpy()[:, None]
        for values in (calibrated.weight_point.scale, calibrated.weight_point.zero_point)
    )
    targets = BlockOutputs(SampleValues.of({"block": layer(x).detach(), "layers": {}}, COUNT))
    cut = _learn(block, targets, [], settings, SEED, lambda n: None)

    weight, data = layer.weight.detach().double().numpy(), x.double().numpy()
    floor = np.floor(weight / scale)
    v = np.log((weight / scale - floor + 0.1) / (1.1 - (weight / scale - floor)))
    first, second = np.zeros_like(v), np.zeros_like(v)
    draws = torch.Generator().manual_seed(SEED)
    for i in range(40):
        rows = data[torch.randint(COUNT, (BATCH,), generator=draws).numpy()]
        sigmoid = 1 / (1 + np.exp(-v))
        free = 1.2 * sigmoid - 0.1
        h, slope = np.clip(free, 0, 1), 1.2 * sigmoid * (1 - sigmoid) * ((free > 0) & (free < 1))
        codes = floor + h + zero_point
        soft = (np.clip(codes, 0, 15) - zero_point) * scale
        miss = rows @ (soft - weight).T
        gradient = 2 / BATCH * miss.T @ rows * scale * ((codes >= 0) & (codes <= 15)) * slope
        if i / 40 >= 0.2:
            beta = 20 - 18 * (i / 40 - 0.2) / 0.8
            distance = 2 * h - 1
            gradient -= 0.01 * beta * np.abs(distance) ** (beta - 1) * np.sign(distance) * 2 * slope
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        v -= 0.05 * (first / (1 - 0.9 ** (i + 1))) / (np.sqrt(second / (1 - 0.999 ** (i + 1))) + 1e-8)
    assert np.abs(v).min() > 1e-3, "no variable is so close to 0 that rounding errors decide"
    expected = np.clip(floor + (v >= 0) + zero_point, 0, 15)
    np.testing.assert_array_equal(calibrated.weight_point.codes(layer.weight).numpy(), expected)

    def error(codes):
        return ((data @ ((np.clip(codes, 0, 15) - zero_point) * scale - weight).T) ** 2).sum(axis=1).mean()

    h = np.clip(1.2 / (1 + np.exp(-v)) - 0.1, 0, 1)
    assert cut == pytest.approx(error(expected) / error(floor + h + zero_point), rel=1e-3), "the cut is measured"


def test_qdrop_keeps_elements_in_full_precision_at_its_rate_and_independently():
    x, quantized = torch.zeros(4, 50_000), torch.ones(4, 50_000)
    for probability in (0.5, 0.2):
        masks = [QDrop(probability, SampleNoise(1, step, range(4)))(x, quantized) == 0 for step in (0, 1)]
        count = masks[0].numel()
        for mask in masks:
            assert abs(float(mask.float().mean()) - probability) < 4 * (probability * (1 - probability) / count) ** 0.5
        both = float((masks[0] & masks[1]).float().mean())
        assert abs(both - probability**2) < 5 * (probability**2 / count) ** 0.5, "other elements at each step"
        rows = float((masks[0][0] & masks[0][1]).float().mean())
        assert abs(rows - probability**2) < 5 * (probability**2 / 50_000) ** 0.5, "and in each sample"


def test_qdrop_mixes_a_blocks_inputs():
    clean, inputs = (
        SampleValues.of(((torch.full((6, 3000), value), 7), {"t": torch.arange(6)}), 6) for value in (0.0, 1.0)
    )
    chosen = torch.tensor([1, 4])
    (mixed, number), named = inputs.mixed(clean, chosen, 0.5, SampleNoise(0, 0, range(2)))
    assert number == 7 and torch.equal(named["t"], chosen), "integers stay"
    assert set(mixed.unique().tolist()) == {0.0, 1.0} and abs(float(mixed.mean()) - 0.5) < 4 * 0.5 / 6000**0.5


def calibrated_model(pipeline, *, ranges=True):
    denoiser = pipeline.unet
    steps = uniform_steps(6, 3, torch.Generator().manual_seed(0))
    request = make_request(pipeline, 3)
    samples = collect(pipeline, denoiser, request, steps, Calibration(samples=6, steps=3), 0, Progress())
    timesteps = samples.timesteps.unique()
    model = insert_fake_quantizers(
        denoiser, describe(denoiser, samples.arguments(slice(0, 2))), QuantSpec(bits="w4a4"), timesteps=timesteps
    )
    if ranges:
        calibrate_ranges(model, samples, "least-error", 6, Progress(), quantized_weights=True)
    return denoiser, samples, model


def trained_names(model, groups):
    """Names of the layers whose weights, and whose input's scales, have parameters in the groups."""
    learned = {id(parameter) for group in groups for parameter in group["params"]}

    def names(part):
        return {
            name
            for name, layer in model.layers.items()
            if part(layer) is not None and any(id(parameter) in learned for parameter in part(layer).parameters())
        }

    return names(lambda layer: layer.weight_point), names(lambda layer: layer.input_point)


@pytest.mark.parametrize("published", [False, True])
def test_alignment_reaches_exactly_its_parameters(published, text_pipeline):
    """TLA: time layers alone. CMA: the weights of the critical layers, and all scales but the time layers'."""
    denoiser, samples, model = calibrated_model(text_pipeline)
    time = {name for name in model.layers if "time_emb" in name}
    critical = {name for name in model.layers if ".to_q" in name or ".ff." in name}
    assert time and critical
    for layers, all_scales, frozen in ((time, False, set()), (critical, True, time)):
        settings = Finetuning(all_scales=all_scales, published=published, global_weight=2.0)
        groups = _parameters(model, sorted(layers), settings, frozen)
        weights, scales = trained_names(model, groups)
        assert weights == layers
        scaled = {name for name, layer in model.layers.items() if layer.input_point is not None}
        assert scales == (scaled - time if all_scales else scaled & layers)
        network_error(
            denoiser, model, samples, torch.arange(6), sorted(layers), 2.0, Ranks(), published=published
        ).backward()
        for group in groups:
            assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in group["params"])
        learned = {id(parameter) for group in groups for parameter in group["params"]}
        others = [parameter for parameter in model.model.parameters() if id(parameter) not in learned]
        assert all(parameter.grad is None for parameter in others)
        for layer in model.layers.values():
            layer.weight_point.freeze(layer.weight)
            layer.inner.requires_grad_(False)
        model.model.zero_grad(set_to_none=True)
        for point in model.activation_points():
            point.freeze()


def test_the_published_loss_is_the_sum_of_mean_squared_errors(text_pipeline):
    denoiser, samples, model = calibrated_model(text_pipeline)
    names = [name for name in model.layers if name.endswith("to_q")]
    chosen = torch.arange(4)
    seen = {}
    handles = [
        part.register_forward_hook(lambda _m, _i, output, key=(kind, name): seen.__setitem__(key, output))
        for name in names
        for kind, part in (("full", denoiser.get_submodule(name)), ("quantized", model.layers[name]))
    ]
    with torch.no_grad():
        outputs = [whole(**samples.arguments(chosen)).sample for whole in (denoiser, model.model)]
        expected = 2 * (outputs[0] - outputs[1]).square().mean()
        expected += sum((seen["full", name] - seen["quantized", name]).square().mean() for name in names)
        for handle in handles:
            handle.remove()
        found = network_error(denoiser, model, samples, chosen, names, 2.0, Ranks(), published=True)
    torch.testing.assert_close(found, expected)


def test_published_alignment_moves_weights_by_adams_rate(text_pipeline, tmp_path):
    """One iteration of Adam moves every weight by its rate, in the weight's own units."""
    denoiser, samples, model = calibrated_model(text_pipeline)
    name = next(name for name in model.layers if name.endswith("attn1.to_q"))
    settings = Finetuning(iterations=1, batch_size=6, weight_rate=1e-3, published=True, all_scales=False)
    points = []
    freeze = type(model.layers[name].weight_point).freeze
    with Workspace(tmp_path) as workspace, pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(model.layers[name].weight_point),
            "freeze",
            lambda point, weight: (points.append(point.quantizer), freeze(point, weight))[1],
        )
        finetune(denoiser, model, samples, [name], settings, workspace=workspace, key="", seed=0, progress=Progress())
    trained = next(quantizer for quantizer in points if hasattr(quantizer, "up"))
    moved = (trained.weight - denoiser.get_submodule(name).weight).abs()
    assert float(moved.max()) == pytest.approx(1e-3, rel=0.01) and float(moved.median()) > 0.9e-3


def test_the_temporal_block_computes_what_the_network_computes(text_pipeline, tmp_path):
    """Its outputs under calibration are those of the time layers within the quantized network."""
    denoiser, samples, model = calibrated_model(text_pipeline, ranges=False)
    names = [name for name in model.layers if "time_emb" in name]
    block = temporal_block(denoiser, names, samples, 4)
    assert next(iter(block.layers)) == "time_embedding.linear_1" and set(block.layers) == set(names)
    for name, layer in block.layers.items():
        root = name == "time_embedding.linear_1"
        before = "time_embedding.linear_1" if name.endswith("linear_2") else "time_embedding.linear_2"
        assert (layer.source, layer.silu) == ((None, False) if root else (before, True)), name
    start = float(block.error(model, torch.arange(3)))
    with Workspace(tmp_path) as workspace:
        rounding = AdaRound(rate=0.05, regularizer=0.0, published=True, below=9)
        reconstruct_time_layers(
            block, model, rounding, 150, 3, workspace=workspace, key="", seed=0, progress=Progress()
        )
    assert float(block.error(model, torch.arange(3))) < 0.95 * start
    rows = [int((samples.timesteps == time).nonzero()[0]) for time in block.timesteps]
    with torch.no_grad(), LayerOutputs.recorded({name: model.layers[name] for name in names}) as inside:
        model.model(**samples.arguments(torch.tensor(rows)))
        for name, output in block.run(model, torch.arange(3)).items():
            torch.testing.assert_close(output, inside[name], msg=name)
