"""Transformer blocks whose float operations are fused with integer layers, against the same in torch."""

from __future__ import annotations

import copy
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from torch import nn

import stepquant as sq
from stepquant.layers.quantized import replace_module
from stepquant.runtime import prepare
from stepquant.runtime.native.build import available
from stepquant.runtime.native.kernel import NativeKernel
from stepquant.runtime.native.norms import layer_norm
from stepquant.runtime.reference import ReferenceKernel
from tests.runtime.native.test_native_blocks import signal_to_noise
from tests.runtime.native.test_native_kernel import assert_same_up_to_ties
from tests.runtime.test_runtimes import linear

pytestmark = pytest.mark.usefixtures("kernels")

ROWS = pytest.mark.parametrize("row", [torch.tensor(1), torch.tensor([2, 0, 1])], ids=["one step", "mixed steps"])


@ROWS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_normalization(affine, dtype, row):
    module, norm = linear(40, 5), nn.LayerNorm(40, eps=1e-5, elementwise_affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = (torch.randn(3, 9, 40) * torch.rand(3, 9, 1) * 5 + 2).to(dtype)
    scale, shift = torch.rand(3, 40) + 0.5, torch.randn(3, 40)
    worth = float(module.input_scale.max() * module.weight_scale.max()) * 128
    for given in ((), (scale, shift)):
        plain = norm(x.float())
        if given:
            plain = plain * scale[:, None] + shift[:, None]
        expected = ReferenceKernel(module)(plain, row)
        with torch.no_grad():
            found = NativeKernel(module).run(x, row, norm=layer_norm(norm, *given), dtype=torch.float32)
        assert_same_up_to_ties(found, expected.detach(), step=worth)


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "geglu"])
@pytest.mark.parametrize("split", [((), ()), ((2, 5), (3, 4))], ids=["whole", "groups"])
def test_activations(name, split):
    module = linear(7, 5, split=split)
    row, x = torch.tensor(1), torch.linspace(-8, 8, 6 * 14).view(2, 3, 14)
    if name == "geglu":
        plain = x[..., :7] * F.gelu(x[..., 7:])
    else:
        x = x[..., :7]
        plain = F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")
    expected = ReferenceKernel(module)(plain, row)
    worth = float(module.input_scale.max() * module.weight_scale.max()) * 128
    assert_same_up_to_ties(NativeKernel(module).run(x, row, activation=name), expected, step=worth)


@ROWS
@pytest.mark.parametrize("activation", ["gelu", "gelu-approximate", "geglu"])
@pytest.mark.parametrize("split", [((), ()), ((2, 5), (3, 4))], ids=["whole", "groups"])
def test_feed_forward(activation, split, row, monkeypatch):
    """Without its block, as in the transformers that have no fused block of their own."""
    block = FeedForward(7, mult=4, activation_fn=activation).eval()
    block.net[0].proj = linear(7, 28 * (2 if activation == "geglu" else 1), split=split)
    block.net[2] = linear(28, 7)
    for layer in (block.net[0].proj, block.net[2]):
        layer.clock.row = row
    prepare(block, "reference")
    x = torch.randn(3, 9, 7)
    expected = block(x)
    prepare(block, "native")
    worth = float(block.net[2].input_scale.max() * block.net[2].weight_scale.max()) * 128
    with monkeypatch.context() as patch:
        patch.setattr(F, "gelu", None)
        assert_same_up_to_ties(block(x), expected, step=worth)
    block.net[2] = nn.Sequential(block.net[2], nn.Identity())
    assert_same_up_to_ties(block(x), expected, step=worth)


@ROWS
def test_gate_and_residual(row):
    module = linear(7, 5)
    x, gate, residual = torch.randn(3, 4, 7), torch.randn(3, 5), torch.randn(3, 4, 5)
    expected = ReferenceKernel(module)(x, row) * gate[:, None] + residual
    for instructions in available():
        found = NativeKernel(module, instructions=instructions).run(x, row, gate=gate, residual=residual)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.fixture(scope="module", params=["text_pipeline", "class_pipeline"])
def case(request):
    """A denoiser without kernels, and its arguments."""
    pipeline = request.getfixturevalue(request.param)
    quantized = sq.quantize(pipeline, "w8a8", recipe="minmax", calibration=sq.Calibration(samples=4, steps=2))
    torch.manual_seed(0)
    if request.param == "text_pipeline":
        denoiser, arguments = quantized.unet, dict(encoder_hidden_states=torch.randn(8, 7, 16))
    else:
        denoiser, arguments = quantized.transformer, dict(class_labels=torch.arange(8) % 4)
    return denoiser, dict(hidden_states=torch.randn(8, 4, 8, 8), timestep=torch.full((8,), 10), **arguments)


@torch.no_grad()
def outputs(case, *, change=None):
    """Of the reference and of the native runtime, the model changed by `change` after that."""
    denoiser, arguments = case
    found = []
    for backend in ("reference", "native"):
        model = copy.deepcopy(denoiser)
        prepare(model, backend)
        if change is not None:
            change(model)
        given = dict(arguments)
        first = given.pop("hidden_states")
        found.append(model(first, **given).sample)
    return found


def seen(model, kind):
    names = []
    for name, module in model.named_modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda _module, _args, _output, name=name: names.append(name))
    return names


def test_denoisers(case):
    called = []
    expected, found = outputs(case, change=lambda model: called.append(seen(model, nn.LayerNorm)))
    assert [len(names) > 1 for names in called] == [True, False]  # DiT's last normalization stands alone
    decibels = [signal_to_noise(*pair) for pair in zip(found, expected, strict=True)]
    assert median(decibels) > 60
    assert min(decibels) > 20


@pytest.mark.parametrize("place", ["attn1.to_k", "attn1.to_out.0", "ff.net.2"])
def test_layer_wrapped_later_is_called(case, place):
    class Twice(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) * 2

    def wrap(model):
        name = next(name for name, _ in model.named_modules() if name.endswith(place))
        replace_module(model, name, Twice(model.get_submodule(name)))

    expected, found = outputs(case, change=wrap)
    assert median(signal_to_noise(*pair) for pair in zip(found, expected, strict=True)) > 50
    plain, _ = outputs(case)
    assert median(signal_to_noise(*pair) for pair in zip(plain, expected, strict=True)) < 50


def test_masks(text_pipeline):
    quantized = sq.quantize(text_pipeline, "w8a8", recipe="minmax", calibration=sq.Calibration(samples=4, steps=2))
    torch.manual_seed(0)
    mask = torch.tensor([[True] * 3 + [False] * 4]).expand(8, -1)
    arguments = dict(hidden_states=torch.randn(8, 4, 8, 8), timestep=10, encoder_hidden_states=torch.randn(8, 7, 16))
    expected, found = outputs((quantized.unet, arguments | dict(encoder_attention_mask=mask)))
    assert median(signal_to_noise(*pair) for pair in zip(found, expected, strict=True)) > 50
    other, _ = outputs((quantized.unet, arguments))
    assert median(signal_to_noise(*pair) for pair in zip(other, expected, strict=True)) < 50
