"""What ``import stepquant`` loads: in fresh processes, since this one has imported everything."""

from __future__ import annotations

import subprocess
import sys

import pytest

import stepquant as sq

CALIBRATING = ("calibration", "optimize", "recipes", "evaluation", "studies", "report", "bench")

LOAD_RUN_SAVE = """
import sys
import stepquant as sq
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request

pipeline = sq.load({folder!r}, backend="reference")
pipeline(num_inference_steps=2, output_type="np")
generate(pipeline, make_request(pipeline, 2), range(1), seed=0)
pipeline.save_pretrained({copy!r})
print(*(name for name in sys.modules if name.startswith("stepquant.")))
"""


@pytest.fixture(scope="module")
def folder(unconditional_pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("import") / "quantized"
    calibration = sq.Calibration(samples=4, steps=2)
    sq.quantize(unconditional_pipeline, "w8a8", recipe="minmax", calibration=calibration).save_pretrained(path)
    return path


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loading_running_and_saving_import_nothing_that_calibrates(folder, tmp_path):
    imported = run(LOAD_RUN_SAVE.format(folder=str(folder), copy=str(tmp_path / "copy"))).split()
    assert "stepquant.saving" in imported
    assert [name for name in imported if name.split(".")[1] in CALIBRATING] == []


def test_names_imported_at_first_use_are_listed_and_found():
    assert set(sq.__all__) <= set(dir(sq))
    program = "import stepquant as sq; print(*(callable(getattr(sq, name)) for name in {0}), sq.recipes.__name__)"
    names = ("quantize", "train", "sensitivity", "Calibration")
    assert run(program.format(names)).split() == ["True"] * 4 + ["stepquant.recipes"]
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        sq.quantise  # noqa: B018
