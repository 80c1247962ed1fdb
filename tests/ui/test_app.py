"""The page of the gallery, tested by a client. Skipped without Gradio, which the extra `dev` installs."""

from __future__ import annotations

import socket
import sys
import urllib.request

import pytest
from typer.testing import CliRunner

from stepquant.cli.main import app
from stepquant.errors import StepquantError
from stepquant.ui.gallery import Gallery


def test_the_command_reports_missing_gradio(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "stepquant.ui.app", raising=False)
    result = CliRunner().invoke(app, ["ui", "--folder", str(tmp_path / "ui")])
    assert result.exit_code == 2, result.output
    assert "stepquant[ui]" in result.stderr
    assert not (tmp_path / "ui").exists()


def test_the_page_is_served_locally_and_responds(unconditional_folder, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="Gradio is not installed")
    client = pytest.importorskip("gradio_client")
    from stepquant.ui.app import launch

    monkeypatch.setattr("stepquant.ui.gallery.SAMPLES", 4)
    monkeypatch.setattr("stepquant.evaluation.compare.peak_memory_bytes", lambda *_: 1)
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gallery = Gallery({"plain": str(unconditional_folder)}, tmp_path)
    page = launch(gallery, "127.0.0.1", port, wait=False)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as response:
            assert "stepquant" in response.read().decode()
        # 127.0.0.2 is the same machine, but not the address of the page.
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", port), timeout=2)
        remote = client.Client(f"http://127.0.0.1:{port}/", verbose=False)
        full, quantized, table = remote.predict("plain", "minmax", "w8a8", "", 0, 2, 2, api_name="/generate")
        assert full != quantized
        assert table["headers"] == ["", "full precision", "quantized"]
        assert any("PSNR" in row[0] and row[2].endswith(" dB") for row in table["data"])
        with pytest.raises(Exception, match="not understood"):
            remote.predict("plain", "minmax", "four", "", 0, 2, 2, api_name="/generate")
        with pytest.raises(StepquantError, match="Choose another `port`"):
            launch(gallery, "127.0.0.1", port, wait=False)
    finally:
        page.close()
