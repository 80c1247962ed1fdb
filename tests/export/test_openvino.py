"""The exported network against the reference runtime."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from stepquant.errors import StepquantError
from stepquant.export.openvino import FoldedKernel, OpenVinoDenoiser, export_openvino
from stepquant.runtime import prepare
from stepquant.runtime.reference import ReferenceKernel
from tests.runtime.native.test_native_blocks import signal_to_noise, unet
from tests.runtime.test_runtimes import CONVOLUTIONS, STEPS, convolution, linear

assert unet is not None  # a fixture


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_folded_convolution(name):
    """Every row of scales and zero points, borders included."""
    module = convolution(**CONVOLUTIONS[name])
    x = torch.randn(2, module.in_channels, 9, 7)
    for row in range(STEPS):
        expected = ReferenceKernel(module)(x, torch.tensor(row))
        torch.testing.assert_close(FoldedKernel(module)(x, torch.tensor(row)), expected, atol=2e-4, rtol=1e-4)


def test_folded_linear():
    module, x = linear(), torch.randn(4, 7)
    for row in range(STEPS):
        expected = ReferenceKernel(module)(x, torch.tensor(row))
        torch.testing.assert_close(FoldedKernel(module)(x, torch.tensor(row)), expected, atol=2e-4, rtol=1e-4)


def test_unsupported_layers():
    assert not FoldedKernel.supports(linear(split=((2, 5), (3, 4))))
    assert not FoldedKernel.supports(linear(bits=(8, None)))


@torch.no_grad()
def test_network(unet, tmp_path):
    """int8 weights, and the result of each step, for any batch."""
    openvino = pytest.importorskip("openvino")
    sample = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    left = export_openvino(unet, {"sample": sample, "timestep": torch.tensor(500.0)}, tmp_path / "unet.xml")
    assert left == ["conv_in"]
    network = openvino.Core().read_model(tmp_path / "unet.xml")
    kinds = [
        node.get_element_type().get_type_name() for node in network.get_ops() if node.get_type_name() == "Constant"
    ]
    assert kinds.count("i8") > 20
    reference, exported = copy.deepcopy(unet), OpenVinoDenoiser(tmp_path / "unet.xml", unet, threads=1)
    prepare(reference, "reference")
    for timestep in (100, 500, 900):
        for x in (sample, sample[:1]):
            expected = reference(x, timestep).sample
            assert signal_to_noise(exported(x, timestep).sample, expected) > 25
    assert signal_to_noise(exported(sample, 100).sample, reference(sample, 900).sample) < 25


def test_failed_export_leaves_no_files(unet, tmp_path, monkeypatch):
    openvino = pytest.importorskip("openvino")

    def full_disk(network, path, **_options):
        path.with_suffix(".bin").write_bytes(b"half of it")
        raise RuntimeError("No space left on device")

    def refused(*_arguments, **_options):
        raise ValueError("no such operation.\nand a trace")

    converted = SimpleNamespace(inputs=[MagicMock(), MagicMock()])
    arguments = {"sample": torch.randn(2, 1, 16, 16), "timestep": torch.tensor(500.0)}
    monkeypatch.setattr(openvino, "save_model", full_disk)
    monkeypatch.setattr(openvino, "convert_model", lambda *_arguments, **_options: converted)
    with pytest.raises(StepquantError, match="no space left on the disk"):
        export_openvino(unet, arguments, tmp_path / "unet.xml")
    monkeypatch.setattr(openvino, "convert_model", refused)
    with pytest.raises(StepquantError, match=r"OpenVINO cannot take this network: no such operation\.$"):
        export_openvino(unet, arguments, tmp_path / "unet.xml")
    assert not list(tmp_path.iterdir())


def test_full_precision_is_refused(unconditional_pipeline, tmp_path):
    pytest.importorskip("openvino")
    with pytest.raises(StepquantError, match="not quantized"):
        export_openvino(unconditional_pipeline.unet, {}, tmp_path / "unet.xml")
