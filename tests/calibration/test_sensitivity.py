"""Sensitivity: the fragile layer ranks first, an interruption changes nothing, every kind of model works."""

import copy
import re
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

import stepquant
from stepquant.calibration.fake_quant.weight import WeightPoint
from stepquant.calibration.model import insert_fake_quantizers
from stepquant.calibration.samples import CalibrationSet
from stepquant.calibration.sensitivity import STEP_GROUPS, layer_points, measure
from stepquant.config import QuantSpec
from stepquant.progress import Progress
from stepquant.workspace import Workspace
from tests.described import described

FRAGILE = "up_blocks.1.resnets.1.conv2"
MIDDLE = "mid_block.resnets.0.conv1"
METHODS = ["one-at-a-time", "leave-one-out"]
SMALL = {"calibration": stepquant.Calibration(samples=8, steps=4)}


@pytest.mark.parametrize("method", METHODS)
def test_the_fragile_layer_ranks_first(method, fragile_pipeline, tmp_path):
    before = copy.deepcopy(fragile_pipeline.unet.state_dict())
    measured = stepquant.sensitivity(fragile_pipeline, "w4a8", workspace=tmp_path, method=method, **SMALL)
    layers = described(fragile_pipeline.unet).layers
    assert tuple(measured.bits) == layers, "not in execution order"
    assert measured.errors.shape == (len(layers), 4)
    assert measured.steps == ((0, 0), (1, 1), (2, 2), (3, 3))
    first, second = measured.ranking()[:2]
    assert first == FRAGILE
    assert measured.mean[first] > 5 * measured.mean[second]
    assert (measured.errors.argmax(dim=0) == layers.index(FRAGILE)).all(), "it is not the worst at every step"
    assert all(torch.equal(value, before[name]) for name, value in fragile_pipeline.unet.state_dict().items())


def test_one_at_a_time_is_the_error_of_rounding_that_weight(unconditional_pipeline, tmp_path):
    measured = stepquant.sensitivity(unconditional_pipeline, "w4a16", workspace=tmp_path, **SMALL)
    parts = [load_file(path) for path in sorted(tmp_path.glob("samples-*.safetensors"))]
    samples = {name: torch.cat([part[f"0/{name}"] for part in parts]) for name in ("sample", "timestep")}
    steps = 3 - samples["timestep"].unique(return_inverse=True)[1]  # the first step is at the latest time
    unet = copy.deepcopy(unconditional_pipeline.unet)
    with torch.no_grad():
        target = unet(**samples).sample
        weight = unet.get_submodule(MIDDLE).weight
        weight.copy_(WeightPoint(weight, 4, (weight.shape[1],), "least-error")(weight))
        output = unet(**samples).sample
    power, error = target.square(), (output - target).square()
    expected = torch.stack([error[steps == step].sum() / power[steps == step].sum() for step in range(4)])
    found = measured.errors[list(measured.bits).index(MIDDLE)]
    assert (expected > 0).all()
    # The network's attention adds up in another order than the one that is measured.
    torch.testing.assert_close(found, expected.double(), rtol=1e-3, atol=0)


def test_both_methods_agree_where_only_one_layer_is_quantized(unconditional_pipeline, tmp_path):
    spec = {"bits": "w4a8", "overrides": {f"^(?!{re.escape(MIDDLE)}$)": "w16a16"}}
    one, rest = (
        stepquant.sensitivity(unconditional_pipeline, spec, workspace=tmp_path, method=method, **SMALL)
        for method in METHODS
    )
    assert list(one.bits) == [MIDDLE]
    assert (one.whole > 0).all()
    assert torch.equal(one.errors[0], one.whole)
    assert torch.equal(rest.errors[0], rest.whole)


def test_the_layers_input_is_quantized_with_it(unconditional_pipeline, tmp_path):
    coarse, exact = (
        stepquant.sensitivity(unconditional_pipeline, bits, workspace=tmp_path, **SMALL) for bits in ("w8a3", "w8a16")
    )
    layers = [name for name in coarse.bits if coarse.bits[name].activation == 3]
    assert len(layers) == len(coarse.bits) - 2, "the first and the last layer keep more"
    assert all(coarse.mean[name] > 10 * exact.mean[name] for name in layers)


def test_probabilities_count_in_the_whole_network_and_for_no_layer(unconditional_pipeline, tmp_path):
    attentions = r"attentions\.\d+$"
    only = {f"^(?!{re.escape(MIDDLE)}$)(?!.*{attentions})": "w16a16"}
    spec = {"bits": "w8a8", "overrides": only, "softmax_bits": 2}
    measured = stepquant.sensitivity(unconditional_pipeline, spec, workspace=tmp_path, **SMALL)
    assert list(measured.bits) == [MIDDLE]
    assert (measured.whole > 2 * measured.errors[0]).all()


def test_operands_of_an_attention_belong_to_the_layers_that_compute_them(unconditional_pipeline):
    unet = unconditional_pipeline.unet
    calibrated = insert_fake_quantizers(unet, described(unet), QuantSpec.parse("w8a8"))
    quantizers = layer_points(calibrated)
    name = "mid_block.attentions.0"
    operands = calibrated.attentions[name].points
    for projection, operand in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
        own = calibrated.layers[f"{name}.{projection}"].input_point
        assert [id(quantizer) for quantizer in quantizers[f"{name}.{projection}"]] == [id(own), id(operands[operand])]
    assert len(quantizers[f"{name}.to_out.0"]) == 1
    every = {id(quantizer) for layer in quantizers.values() for quantizer in layer}
    left = {id(attention.points["probability"]) for attention in calibrated.attentions.values()}
    assert every | left == {id(quantizer) for quantizer in calibrated.activation_points()}


@pytest.mark.parametrize("method", METHODS)
def test_blocks_before_a_layers_block_run_once_and_give_the_same_output(method, unconditional_pipeline, tmp_path):
    unet = copy.deepcopy(unconditional_pipeline.unet)
    description = described(unet)
    first = description.layers[0]
    calibrated = insert_fake_quantizers(unet, description, QuantSpec.parse("w4a16"))
    timesteps = torch.tensor([900, 100, 500])
    samples = CalibrationSet.of({"sample": torch.randn(3, 1, 16, 16), "timestep": timesteps}, torch.tensor([0, 2, 1]))
    runs = []
    calibrated.model.get_submodule(first).register_forward_hook(lambda *_: runs.append(1))
    progress, workspace = Progress(), Workspace(tmp_path)
    given = {"batch_size": 2, "workspace": workspace, "stage": "ranking", "progress": progress}
    measured = measure(calibrated, description.blocks, samples, method, **given)
    inside = len(calibrated.layers_in(description.blocks[0]))
    assert len(runs) == 2 * (2 + inside), "two batches: in full precision, quantized, and for the layers of its block"

    def output(quantized):
        for name, layer in calibrated.layers.items():
            layer.weight_point.bypassed = name not in quantized
        with torch.no_grad():
            return torch.cat([calibrated.model(**samples.arguments(rows)).sample for rows in samples.batches(2)])

    def power(values):
        return values.double().square().flatten(1).sum(dim=1)

    target, names = output(()), set(calibrated.layers)
    for name in (MIDDLE, FRAGILE):
        if method == "one-at-a-time":
            expected = power(output({name}) - target)
        else:
            expected = power(output(names) - target) - power(output(names - {name}) - target)
        found = measured.errors[list(measured.bits).index(name)]
        torch.testing.assert_close(found, (expected / power(target))[[0, 2, 1]], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["class_pipeline", "text_pipeline"])
def test_conditional_models_are_ranked(kind, request, tmp_path):
    pipeline = request.getfixturevalue(kind)
    measured = stepquant.sensitivity(pipeline, "w4a4", workspace=tmp_path, calibration={"samples": 2, "steps": 2})
    assert torch.isfinite(measured.errors).all() and (measured.errors >= 0).all()
    assert measured.errors.sum() > 0


def test_groups_of_steps_with_more_steps_than_groups_or_samples(unconditional_pipeline, tmp_path):
    given = {"samples": 24, "steps": 24}
    measured = stepquant.sensitivity(unconditional_pipeline, "w4a16", workspace=tmp_path, calibration=given)
    assert measured.errors.shape[1] == len(measured.steps) == STEP_GROUPS
    ends = [end for pair in measured.steps for end in pair]
    assert ends == sorted(ends) and (ends[0], ends[-1]) == (0, 23)
    few = given | {"samples": 2}
    measured = stepquant.sensitivity(unconditional_pipeline, "w4a16", workspace=tmp_path, calibration=few)
    assert measured.steps == ((0, 0), (23, 23))


class _Interrupted(Progress):
    """Interrupts the ranking after five layers."""

    @contextmanager
    def task(self, description, total):
        left = [5]

        def advance(count):
            left[0] -= count
            if description.startswith("Ranking") and left[0] <= 0:
                raise KeyboardInterrupt

        yield advance


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_ranking_continues_and_gives_the_same_numbers(method, unconditional_pipeline, tmp_path):
    pipeline = copy.copy(unconditional_pipeline)
    pipeline.register_modules(unet=copy.deepcopy(unconditional_pipeline.unet))
    passes = []
    pipeline.unet.register_forward_hook(lambda *_: passes.append(1))  # the copy that is measured gets it too

    def measure(folder, progress=None):
        passes.clear()
        spec = {"bits": "w4a8", "overrides": {"time_emb": "w16a16"}}
        return stepquant.sensitivity(
            pipeline, spec, workspace=tmp_path / folder, method=method, progress=progress, **SMALL
        )

    whole = measure("whole")
    needed = len(passes)
    with pytest.raises(KeyboardInterrupt):
        measure("parts", _Interrupted())
    continued = measure("parts")
    # Not again: two images of four steps whose calls are compared, the trajectories' four steps, five layers.
    assert len(passes) == needed - 2 * 4 - 4 - 5
    assert torch.equal(continued.errors, whole.errors) and torch.equal(continued.whole, whole.whole)
    assert continued.steps == whole.steps and continued.bits == whole.bits
    again = measure("parts")
    assert len(passes) == 2, "more than the description, which takes two calls, was measured again"
    assert torch.equal(again.errors, whole.errors)
