"""Recorded blocks against the same blocks run kernel by kernel, bit for bit."""

from __future__ import annotations

import copy
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from hypothesis import given
from hypothesis import strategies as st

import stepquant as sq
from stepquant.calibration.model import insert_fake_quantizers
from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.layers.install import install
from stepquant.layers.quantized import replace_module
from stepquant.runtime import prepare
from stepquant.runtime.native import recording, replay
from stepquant.runtime.native.kernel import NativeKernel
from stepquant.runtime.native.memory import Memory, lay_out
from stepquant.runtime.native.norms import Norm
from stepquant.runtime.native.recording import Recorder, Recording
from stepquant.runtime.native.replay import step_by_step
from tests.described import described
from tests.runtime.native.test_native_blocks import Twice
from tests.runtime.test_runtimes import convolution, linear

pytestmark = pytest.mark.usefixtures("kernels")

TIMES = (900, 500, 100)


def build(request, built):
    """A denoiser in native integers with per-step scales, the shape of one sample, and conditions of two."""
    if request.param not in built:
        built[request.param] = quantized(request)
    return built[request.param]


@pytest.fixture(scope="module")
def built():
    """Name of a pipeline -> what `build` returns for it."""
    return {}


def quantized(request):
    pipeline = request.getfixturevalue(request.param)
    settings = {"rounding_iterations": 0, "time_iterations": 0, "iterations": 0}
    result = sq.quantize(
        pipeline,
        "w8a8",
        recipe=sq.recipes.QuEST(**settings),
        calibration=sq.Calibration(samples=8, steps=4),
        backend="native",
    )
    if request.param == "class_pipeline":
        return result.transformer, (4, 8, 8), {"class_labels": torch.tensor([1, 2])}
    if request.param == "text_pipeline":
        return result.unet, (4, 8, 8), {"encoder_hidden_states": torch.randn(2, 7, 16)}
    return result.unet, (1, 16, 16), {}


UNETS = ["unconditional_pipeline", "text_pipeline"]
case = pytest.fixture(build, scope="module", params=[*UNETS, "class_pipeline"], name="case")
unet_case = pytest.fixture(build, scope="module", params=UNETS, name="unet_case")


@pytest.fixture(scope="module")
def static_unet(unconditional_pipeline):
    """One grid for all steps, so that no kernel reads the step."""
    full = unconditional_pipeline.unet
    calibrated = insert_fake_quantizers(full, described(full), QuantSpec.parse("w8a8"), weight_range="minmax")
    for quantizer in calibrated.activation_points():
        quantizer.observe()
    with torch.no_grad():
        calibrated.model(torch.randn(4, 1, 16, 16), 500)
    for quantizer in calibrated.activation_points():
        quantizer.calibrate("minmax", per_row=False)
    result = copy.deepcopy(full)
    install(result, calibrated.to_quantized())
    prepare(result, "native")
    return result


def runs(model, shape, conditions, times=TIMES, *, plain=False, seed=0, mode=torch.no_grad, hooks=True):
    generator = torch.Generator().manual_seed(seed)
    with mode(), step_by_step() if plain else nullcontext():
        return [
            (model if hooks else model.forward)(
                torch.randn(2, *shape, generator=generator).to(model.dtype), torch.tensor([time, time]), **conditions
            ).sample
            for time in times
        ]


def recorded(model) -> list:
    """The recordings of all blocks, for every layout."""
    blocks = [module.__dict__["_recordings"] for module in model.modules() if "_recordings" in module.__dict__]
    return [one for block in blocks for one in block.by_layout.values()]


def test_recording_equals_kernels(case):
    model, shape, conditions = case
    model = copy.deepcopy(model)
    expected = runs(model, shape, conditions, TIMES * 2, plain=True)
    assert recorded(model) == []
    found = runs(model, shape, conditions, TIMES * 2)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert recorded(model)
    assert any(isinstance(one, Recording) for one in recorded(model))
    # Scales differ between steps: this detects a recording that keeps those of its own step.
    assert not torch.equal(*(runs(model, shape, conditions, [time])[0] for time in (900, 100)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_types_and_modes(static_unet, dtype, mode):
    """In half precision kernels read converted copies of the norms' parameters, which are freed after a call."""
    model = copy.deepcopy(static_unet).to(dtype)
    expected = runs(model, (1, 16, 16), {}, TIMES * 2, plain=True, mode=mode)
    found = runs(model, (1, 16, 16), {}, TIMES * 2, mode=mode)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert {y.dtype for y in found} == {dtype}
    kinds = {torch.float32: {Recording}, torch.float64: set()}
    assert {type(one) for one in recorded(model)} == kinds.get(dtype, {bool})


def test_temporary_memory_is_an_obstacle():
    kernel, row, x = NativeKernel(linear(7, 5)), torch.tensor(1), torch.randn(2, 3, 7)
    norm = Norm(torch.rand(1, 7) + 0.5, torch.randn(1, 7), 1e-5)
    expected = kernel.run(x, row, norm=norm)

    def recording(lasting):
        with Recorder([x], row, 1, kernel.by_row, lasting) as recorder:
            result = kernel.run(x, row, norm=norm)
        return recorder.finish(result)

    assert recording(kernel.lasting) is None
    assert torch.equal(recording([*kernel.lasting, norm.multiply, norm.add]).replay([x], 1), expected)


def test_recording_keeps_tensors_that_it_points_into():
    """A layer may drop the plan that was recorded."""
    kernel, row = NativeKernel(convolution(4, 6, 3, padding=1)), torch.tensor(1)
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    expected = kernel(x, row)
    with Recorder([x], row, 1, kernel.by_row, kernel.lasting) as recorder:
        result = kernel(x, row)
    recording = recorder.finish(result)
    (taps,) = [weakref.ref(plan.geometries[0].taps) for plan in kernel.plans.values()]
    kernel.plans.clear()
    del recorder
    assert taps() is not None
    assert torch.equal(recording.replay([x], 1), expected)
    for missing in (3, -1):
        with pytest.raises(StepquantError, match=f"the clock is at row {missing}; expected one of the 3 rows"):
            recording.replay([x], missing)
    del recording
    assert taps() is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_block_of_a_unet_is_recorded(unet_case, mode):
    model, shape, conditions = unet_case
    model = copy.deepcopy(model)
    expected = runs(model, shape, conditions, plain=True, mode=mode)
    found = runs(model, shape, conditions, mode=mode)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
        assert [type(one) for one in block.__dict__["_recordings"].by_layout.values()] == [Recording]


def test_no_kernel_is_called_from_python(unet_case, monkeypatch):
    """Only the kernels outside of a recorded UNet's blocks are called one by one."""
    model, shape, conditions = unet_case
    model = copy.deepcopy(model)
    runs(model, shape, conditions)
    called = []
    for name, module in model.named_modules():
        if name.endswith(".kernel") and "blocks" in name and hasattr(module, "run"):
            monkeypatch.setattr(module, "run", lambda *_args, name=name, **_kwargs: called.append(name))
    runs(model, shape, conditions)
    assert called == []


def test_mixed_timesteps_have_no_recording(case):
    model, shape, conditions = case
    model = copy.deepcopy(model)
    runs(model, shape, conditions)
    x = torch.randn(2, *shape)
    with torch.no_grad():
        mixed = model(x, torch.tensor([900, 100]), **conditions).sample
        with step_by_step():
            assert torch.equal(mixed, model(x, torch.tensor([900, 100]), **conditions).sample)


def _norm(model):
    norm = next(module for module in model.up_blocks[0].modules() if isinstance(module, torch.nn.GroupNorm))
    norm.weight = torch.nn.Parameter(norm.weight.detach() * 2)


def _norm_in_place(model):
    norm = next(module for module in model.up_blocks[0].modules() if isinstance(module, torch.nn.GroupNorm))
    with torch.no_grad():
        norm.weight.mul_(2)


def _layer(model):
    replace_module(model, "up_blocks.0.resnets.0.conv1", Twice(model.get_submodule("up_blocks.0.resnets.0.conv1")))


def _processor(model):
    module = next(module for module in model.modules() if hasattr(module, "set_processor"))
    module.set_processor(AttnProcessor2_0())


def _free_u(model):
    for block in model.up_blocks:
        block.s1, block.s2, block.b1, block.b2 = 0.5, 0.5, 1.5, 1.5


def _forward(model):
    resnet = model.up_blocks[0].resnets[0]
    before = resnet.forward
    resnet.forward = lambda *args, **kwargs: before(*args, **kwargs) * 2


@pytest.mark.parametrize("change", [_norm, _norm_in_place, _layer, _processor, _free_u, _forward])
def test_changes_are_noticed(change, unet_case):
    model, shape, conditions = unet_case
    model = copy.deepcopy(model)
    before = runs(model, shape, conditions)
    change(model)
    expected = runs(model, shape, conditions, plain=True)
    # FreeU is for text models; another attention processor computes the same.
    if change is not _processor and (conditions or change is not _free_u):
        assert not torch.equal(before[0], expected[0])
    for _ in range(2):
        found = runs(model, shape, conditions)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_hook_inside_is_called_at_every_step(unet_case):
    model, shape, conditions = unet_case
    model = copy.deepcopy(model)
    expected = runs(model, shape, conditions)
    calls = []
    handle = model.up_blocks[0].resnets[0].register_forward_hook(lambda *_: calls.append(1))
    assert all(torch.equal(*pair) for pair in zip(runs(model, shape, conditions), expected, strict=True))
    assert len(calls) == len(TIMES)
    handle.remove()
    runs(model, shape, conditions)
    assert len(calls) == len(TIMES)


def test_other_backend_has_no_recordings(case):
    model, shape, conditions = case
    model = copy.deepcopy(model)
    runs(model, shape, conditions)
    prepare(model, "reference")
    assert recorded(model) == []
    expected = runs(model, shape, conditions, plain=True)
    assert all(torch.equal(*pair) for pair in zip(runs(model, shape, conditions), expected, strict=True))


def test_copies_have_separate_recordings(case):
    model, shape, conditions = case
    first = copy.deepcopy(model)
    expected = runs(first, shape, conditions)
    second = copy.deepcopy(first)
    assert recorded(second) == []
    del first
    assert all(torch.equal(*pair) for pair in zip(runs(second, shape, conditions), expected, strict=True))


def test_two_threads_on_one_model(case):
    """The denoiser refuses it; without its hooks, at one timestep, the kernels must not confuse the two threads."""
    model, shape, conditions = case
    model = copy.deepcopy(model)
    times = [500] * 6
    expected = [runs(model, shape, conditions, times, plain=True, seed=seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            found = list(pool.map(lambda seed: runs(model, shape, conditions, times, seed=seed, hooks=False), (1, 2)))
            for some, others in zip(found, expected, strict=True):
                assert all(torch.equal(*pair) for pair in zip(some, others, strict=True))


def test_block_that_cannot_be_recorded_runs(case, monkeypatch):
    model, shape, conditions = case
    model = copy.deepcopy(model)
    monkeypatch.setattr(recording, "MOST_BYTES", 0)
    expected = runs(model, shape, conditions, plain=True)
    found = runs(model, shape, conditions)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert set(recorded(model)) == {False}


def test_number_of_recordings_is_limited(case, monkeypatch):
    model, shape, conditions = case
    model = copy.deepcopy(model)
    monkeypatch.setattr(replay, "MOST_LAYOUTS", 2)
    with torch.no_grad():
        for batch in (1, 2, 3, 4, 2, 2, 2):
            more = {name: value[:1].expand(batch, *value.shape[1:]).clone() for name, value in conditions.items()}
            model(torch.randn(batch, *shape), torch.full((batch,), 500), **more)
    blocks = [module.__dict__["_recordings"] for module in model.modules() if "_recordings" in module.__dict__]
    assert max(len(block.by_layout) for block in blocks) <= 2
    assert any(isinstance(one, Recording) for one in recorded(model))


LIVES = st.lists(st.tuples(st.integers(1, 500), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=20)


@given(LIVES)
def test_memory_in_use_is_not_shared(lives):
    memories = [Memory(0, size, torch.empty(0), min(born, last), max(born, last)) for size, born, last in lives]
    total = lay_out(memories)
    assert total <= sum((memory.stop + 63) // 64 * 64 for memory in memories)
    for index, one in enumerate(memories):
        assert one.offset + one.stop <= total
        for other in memories[index + 1 :]:
            together = one.born <= other.last and other.born <= one.last
            apart = one.offset + one.stop <= other.offset or other.offset + other.stop <= one.offset
            assert apart or not together
