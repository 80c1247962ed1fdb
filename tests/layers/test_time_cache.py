"""Cached outputs by timestep are exact and not computed twice."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import stepquant
from stepquant.layers.clock import StepClock
from stepquant.layers.install import install_empty
from stepquant.layers.quantized import quantized_modules
from stepquant.layers.time_cache import MOST_TIMESTEPS, TimeCache, TimeLinear
from tests.described import described


class Counted(nn.Linear):
    """A linear that counts its calls."""

    count = 0

    def forward(self, x):
        self.count += 1
        return super().forward(x)


class Rig:
    """A cache in front of a counted linear."""

    def __init__(self):
        torch.manual_seed(0)
        self.linear, self.cache = Counted(6, 5), TimeCache()

    @torch.no_grad()
    def __call__(self, x, time, layer=None):
        before = self.linear.count
        y = self.cache(x, torch.as_tensor(time, dtype=torch.float32), layer, self.linear)
        torch.testing.assert_close(y, nn.functional.linear(x, self.linear.weight, self.linear.bias))
        return self.linear.count - before


def test_embedding_is_computed_once_per_timestep():
    rig, x = Rig(), {time: torch.randn(1, 6) for time in (3, 7)}
    counts = [rig(x[time].repeat(size, 1), time) for time, size in ((3, 4), (3, 4), (7, 4), (3, 9), (7, 1))]
    assert counts == [1, 0, 1, 0, 0]


def test_other_inputs_are_computed():
    rig, same = Rig(), torch.randn(1, 6)
    rig(same.repeat(4, 1), 3)
    assert rig(torch.randn(4, 6), 3) == 1, "samples of different classes"
    assert rig((same + 1e-6).repeat(4, 1), 3) == 1, "another embedding at the same timestep"
    assert rig(same.repeat(4, 1), [3, 3, 5, 5]) == 1, "samples of different steps"
    assert rig(same.repeat(2, 1).unsqueeze(0), 3) == 1


def test_changed_layer_and_dtype_are_computed():
    rig, x = Rig(), torch.randn(2, 1, 6)[:, 0][:1].repeat(3, 1)
    assert [rig(x, 3, layer) for layer in ("old", "old", "new", "new")] == [1, 0, 1, 0]
    rig.linear.double()
    assert rig(x.double(), 3, "new") == 1


def test_gradients_pass_through():
    rig, x = Rig(), torch.randn(2, 6)[:1].repeat(3, 1)
    rig(x, 3)
    x = x.clone().requires_grad_()
    rig.cache(x, torch.tensor(3.0), None, rig.linear).sum().backward()
    assert x.grad is not None and rig.linear.count == 2


def test_cachery_is_bounded():
    rig = Rig()
    for time in range(MOST_TIMESTEPS + 5):
        rig(torch.full((2, 6), float(time)), time)
    assert len(rig.cache._known) == MOST_TIMESTEPS
    assert rig(torch.full((2, 6), 1000.0), 1000) == 0
    assert rig(torch.zeros(2, 6), 0) == 1


@pytest.mark.parametrize("change", ["in place", "data", "assigned", "bias"])
def test_linear_with_changed_parameters_is_computed_again(change):
    torch.manual_seed(1)
    plain, clock = nn.Linear(40, 5), StepClock()
    linear = TimeLinear.like(plain, clock)
    x = torch.randn(1, 40).repeat(3, 1)
    clock.set(5)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), plain(x))
        delta = 0.1 * torch.randn(5, 1) @ torch.randn(1, 40)
        if change == "in place":
            linear.weight += delta
        elif change == "data":
            linear.weight.data += delta  # how adapters are merged; autograd's version counter does not see it
        elif change == "assigned":
            linear.weight = nn.Parameter(linear.weight + delta)
        else:
            linear.bias.data += 1
        expected = nn.functional.linear(x, linear.weight, linear.bias)
        torch.testing.assert_close(linear(x), expected)


def _quantized(pipeline, **spec):
    calibration = stepquant.Calibration(samples=4, steps=2)
    return stepquant.quantize(pipeline, {"bits": "w8a8", **spec}, recipe="minmax", calibration=calibration)


@pytest.mark.parametrize("exact_time", [False, True])
def test_cached_time_layers_do_not_change_the_model(exact_time, unconditional_pipeline, tmp_path):
    _quantized(unconditional_pipeline, exact_time=exact_time).save_pretrained(tmp_path / "out")
    # The native kernels compute the projections in residual blocks, which takes less than looking them up.
    model = stepquant.load(tmp_path / "out", backend="reference").unet
    names = [name for name in described(unconditional_pipeline.unet).layers if "time_emb" in name]
    assert len(names) > 4
    plain = copy.deepcopy(model)
    for name in names:
        module = plain.get_submodule(name)
        module.time_cache = lambda x, time, layer, compute: compute(x)
    assert all(isinstance(model.get_submodule(name), TimeLinear) == exact_time for name in names)
    x = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        for time in (900, 3, torch.tensor([3, 900]), 900, 3, torch.tensor([3, 900]), 901):
            assert torch.equal(model(x, time).sample, plain(x, time).sample)
        caches = [model.get_submodule(name).time_cache._known for name in names]
        assert all(set(known) == {900.0, 3.0, 901.0} for known in caches)
        copied = copy.deepcopy(model)
        assert not copied.get_submodule(names[0]).time_cache._known, "a copy starts empty"
        with ThreadPoolExecutor(2) as pool:
            for times in ((3, 900), (900, 3), (3, 3)):
                found = list(pool.map(lambda one, time: one(x, time).sample, (model, copied), times))
                for y, time in zip(found, times, strict=True):
                    assert torch.equal(y, plain(x, time).sample)
        model.half()
        torch.testing.assert_close(model(x.half(), 3).sample, plain.half()(x.half(), 3).sample)


def test_time_layer_must_be_linear(unconditional_pipeline):
    model = copy.deepcopy(unconditional_pipeline.unet)
    structure = {"timesteps": [0.0], "layers": {}, "attentions": {}}
    for name, message in (("conv_in", "expected a linear"), ("nowhere", "no layer 'nowhere'")):
        with pytest.raises(stepquant.StepquantError, match=message):
            install_empty(model, structure | {"time_layers": [name]})


def test_class_embeddings(class_pipeline):
    model = _quantized(class_pipeline).transformer
    assert any(module.time_cache is not None for module in quantized_modules(model).values())
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 5])
    with torch.no_grad():
        first, second = (model(x, torch.tensor([t, t]), labels).sample for t in (7, 7))
        other = model(x, torch.tensor([7, 7]), labels.flip(0)).sample
    assert torch.equal(first, second) and not torch.equal(first, other)
