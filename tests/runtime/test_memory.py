"""How weights are held: once, as bytes or two to a byte, and with the same results."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import stepquant as sq
from stepquant.errors import StepquantError
from stepquant.layers.quantized import QuantizedModule
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
from stepquant.runtime import fallbacks, native, prepare
from stepquant.runtime.native.build import available
from tests.runtime.test_runtimes import BACKENDS_HERE, CONVOLUTIONS, SPLITS, convolution, linear

needs_native = pytest.mark.skipif(native.supported() is not None, reason=str(native.supported()))
BITS = (2, 3, 4, 5, 8)


def held(module: QuantizedModule) -> int:
    """Bytes of weights that a layer and its kernel hold."""
    kernel = sum(piece.weight.untyped_storage().nbytes() for piece in module.kernel.layer.pieces)
    return kernel + module.weight_packed.untyped_storage().nbytes()


def check(module, x, row):
    """Results are identical, packed or not, with AMX or without, and the kernel returns its weight."""
    expected = module.layer().weight
    for instructions in available():
        kernels = [native.NativeKernel(module, instructions=instructions, packed=packed) for packed in (False, True)]
        assert torch.equal(kernels[1](x, row), kernels[0](x, row))
        for kernel in kernels:
            assert torch.equal(kernel.integers(), expected.integers())


@needs_native
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, bits):
    module = convolution(**CONVOLUTIONS[name], bits=(bits, 8))
    check(module, torch.randn(3, module.in_channels, 19, 17), torch.tensor([1, 0, 2]))


@needs_native
@pytest.mark.parametrize("split", SPLITS)
def test_split_channels(split):
    row = torch.tensor([1, 0, 1])
    check(convolution(7, 37, 3, padding=1, split=SPLITS[split], bits=(4, 8)), torch.randn(3, 7, 6, 5), row)
    check(linear(split=SPLITS[split], outputs=70, bits=(4, 4)), torch.randn(3, 50, 7), row)


@needs_native
def test_many_rows_and_columns():
    """Several blocks of columns a thread, unpacked one after the other, by two threads."""
    module, x = linear(inputs=300, outputs=170, bits=(4, 8)), torch.randn(400, 300)
    try:
        torch.set_num_threads(2)
        check(module, x, torch.tensor(1))
    finally:
        torch.set_num_threads(1)


@needs_native
def test_weights_are_held_once():
    modules = {bits: linear(inputs=640, outputs=320, bits=(bits, 8)) for bits in (4, 8)}
    model = nn.ModuleList(modules.values())
    codes = 640 * 320
    for memory, of_four in (("unpacked", 1), ("packed", 0.5)):
        prepare(model, "native", memory)
        assert held(modules[8]) == codes + 1
        assert held(modules[4]) == of_four * codes + 1


@needs_native
@pytest.mark.parametrize("memory", ["unpacked", "packed"])
@pytest.mark.parametrize("bits", BITS)
def test_released_codes_are_restored(bits, memory):
    """In the state dict, in copies, for another runtime, and when others are loaded into the layer."""
    module = convolution(6, 9, 3, padding=1, bits=(bits, 8))
    codes = module.weight_packed.clone()
    model, other = nn.Sequential(module), copy.deepcopy(module)
    prepare(model, "native", memory)
    assert not torch.equal(module.weight_packed, codes)
    assert module.weight_packed.shape == codes.shape
    for held_by in (model, copy.deepcopy(model), model.to(torch.float64)):
        assert torch.equal(held_by.state_dict()["0.weight_packed"], codes)
        assert torch.equal(held_by[0].layer().weight.codes, other.layer().weight.codes)
    prepare(model, "reference")
    assert torch.equal(module.weight_packed, codes)
    prepare(model, "native", memory)
    other.weight_packed.fill_(0)
    model.load_state_dict({f"0.{name}": value for name, value in other.state_dict().items()})
    assert torch.equal(model.state_dict()["0.weight_packed"], other.weight_packed)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS_HERE])
def test_every_runtime(backend):
    """Layers without a native kernel, too, in a copy of the model as well; only codes stay in memory."""
    layers = [convolution(4, 4, 3, padding=1, bits=(4, 8)), convolution(4, 4, 3, padding=1, groups=2, bits=(4, 8))]
    model = nn.Sequential(*layers, convolution(4, 5, 3, bits=(4, None)))
    x = torch.randn(2, 4, 6, 6)
    prepare(model, backend)
    expected, slow = model(x), fallbacks(model)
    prepare(model, backend, "packed")
    duplicate = copy.deepcopy(model)
    assert torch.equal(model(x), expected)
    assert fallbacks(model) == slow
    model[2].weight_packed.zero_()
    assert not torch.equal(model(x), expected)
    assert torch.equal(duplicate(x), expected)


def test_pipeline(unconditional_pipeline, tmp_path):
    """`load` takes it, images are the same, and so is what is written again."""
    calibration = sq.Calibration(samples=4, steps=2)
    sq.quantize(unconditional_pipeline, "w4a8", recipe="minmax", calibration=calibration).save_pretrained(
        tmp_path / "a"
    )
    images = []
    for memory in ("unpacked", "packed"):
        pipeline = sq.load(tmp_path / "a", memory=memory)
        images.append(generate(pipeline, make_request(pipeline, 2), range(2), seed=0))
        pipeline.save_pretrained(tmp_path / memory)
        for path in sorted((tmp_path / "a").rglob("*.safetensors")):
            assert (tmp_path / memory / path.relative_to(tmp_path / "a")).read_bytes() == path.read_bytes()
    assert torch.equal(*images)


def test_bad_input():
    with pytest.raises(StepquantError, match="memory is 'folded': expected unpacked or packed"):
        prepare(nn.Sequential(), "reference", "folded")
    with pytest.raises(StepquantError, match="a custom runtime takes no `memory`"):
        prepare(nn.Sequential(), lambda module: None, "packed")
