"""What an import, inference and export of a checkpoint load; in a new process, as this one has imported everything."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import stepquant

VERSION_1 = Path(__file__).parent / "checkpoint" / "data" / "version1"
STEPS = {
    "load": "pipeline = stepquant.load(folder, backend='reference')",
    "load by diffusers": "DiffusionPipeline.from_pretrained(folder)",
    "round weights while loading": """
config = stepquant.StepquantConfig("w8a16")
UNet2DModel.from_pretrained(plain, subfolder="unet", quantization_config=config)
""",
    "run": "pipeline(num_inference_steps=2, output_type='np')",
    "generate": """
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request
generate(pipeline, make_request(pipeline, 2), range(1), seed=0)
""",
    "save": "pipeline.save_pretrained(out + '/saved')",
    "export": """
from stepquant.export.network import example_arguments
from stepquant.export import onnx, openvino
arguments = example_arguments(pipeline)
if onnx_installed:
    onnx.export_onnx(pipeline.unet, arguments, Path(out, "network.onnx"))
if openvino_installed:
    openvino.export_openvino(pipeline.unet, arguments, Path(out, "network.xml"))
""",
}
HEAD = """
import sys
from pathlib import Path
import stepquant
from diffusers import DiffusionPipeline, UNet2DModel
folder, plain, out, onnx_installed, openvino_installed = *sys.argv[1:4], *(flag == "True" for flag in sys.argv[4:])
unwanted = ("calibration", "optimize", "recipes", "evaluation", "studies", "report", "bench", "ui", "cli", "api")
def check(what):
    found = sorted(name for name in sys.modules if name.startswith("stepquant.") and name.split(".")[1] in unwanted)
    assert not found, f"{what} imports {found}"
check("import stepquant")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each format version."""
    current = tmp_path_factory.mktemp("current") / "model"
    stepquant.save(stepquant.load(VERSION_1), current)
    return {"version 1": VERSION_1, "version 2": current}


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("version", ["version 1", "version 2"])
def test_inference_and_export_import_no_calibration(version, folders, unconditional_folder, tmp_path):
    code = HEAD + "".join(f"{step}\ncheck({name!r})\n" for name, step in STEPS.items())
    installed = [str(find_spec(name) is not None) for name in ("onnx", "openvino")]
    run(code, str(folders[version]), str(unconditional_folder), str(tmp_path), *installed)


def test_lazily_imported_names_are_listed_and_available():
    assert set(stepquant.__all__) <= set(dir(stepquant))
    names = ("quantize", "train", "sensitivity", "Calibration")
    program = f"import stepquant as sq; print(*(callable(getattr(sq, name)) for name in {names}), sq.recipes.__name__)"
    assert run(program).split() == ["True"] * 4 + ["stepquant.recipes"]
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        stepquant.quantise  # noqa: B018
