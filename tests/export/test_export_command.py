"""``stepquant export``: from a checkpoint to a network that generates in the same pipeline."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

import stepquant as sq
from stepquant.cli.main import app
from stepquant.export.onnx import OnnxDenoiser
from stepquant.export.openvino import OpenVinoDenoiser
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request


@pytest.fixture(scope="module")
def folder(unconditional_pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "quantized"
    calibration = sq.Calibration(samples=4, steps=2)
    sq.quantize(unconditional_pipeline, "w8a8", recipe="minmax", calibration=calibration).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("to", "network", "kind"), [("openvino", "unet.xml", OpenVinoDenoiser), ("onnx", "unet.onnx", OnnxDenoiser)]
)
def test_command(folder, tmp_path, to, network, kind):
    if to == "openvino":
        pytest.importorskip("openvino")
    result = CliRunner().invoke(app, ["export", str(folder), "--to", to, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "1 layers stay in floating point: conv_in" in result.output
    assert str(tmp_path / network) in result.output
    pipeline = sq.load(folder, backend="reference")
    request = make_request(pipeline, 2)
    expected = generate(pipeline, request, range(2), seed=0)
    pipeline.unet = kind(tmp_path / network, pipeline.unet, threads=1)
    found = generate(pipeline, request, range(2), seed=0)
    assert float((found - expected).square().mean()) < 1e-3 * float(expected.square().mean())


def test_unknown_format(folder, tmp_path):
    result = CliRunner().invoke(app, ["export", str(folder), "--to", "tflite", "--out", str(tmp_path / "new")])
    assert result.exit_code == 2
    assert result.stderr == "stepquant: format 'tflite' is unknown; expected one of openvino, onnx, gguf.\n"
    assert not (tmp_path / "new").exists()
