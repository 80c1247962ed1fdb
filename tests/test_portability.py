"""Everything except the native kernels works without the functions of POSIX systems."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import stepquant

POSIX_MODULES = ("fcntl", "grp", "posix", "pwd", "resource", "termios")
POSIX_FUNCTIONS = ("fork", "getuid", "posix_fallocate", "sched_getaffinity")

PROGRAM = f"""
import builtins, os, sys
import diffusers, filelock, torch

real_import = builtins.__import__


def hiding_import(name, globals=None, *args, **kwargs):
    importer = (globals or {{}}).get("__name__", "").partition(".")[0]
    if name in {POSIX_MODULES} and importer == "stepquant":
        raise ModuleNotFoundError(name)
    return real_import(name, globals, *args, **kwargs)


builtins.__import__ = hiding_import
for name in {POSIX_FUNCTIONS}:
    delattr(os, name)
filelock.FileLock = filelock.SoftFileLock  # its replacement without fcntl

import stepquant as sq
from stepquant import files
from stepquant.pipelines.generate import generate
from stepquant.pipelines.request import make_request

files.WINDOWS = True
source, work, out = sys.argv[1:]
pipeline = diffusers.DiffusionPipeline.from_pretrained(source)
calibration = sq.Calibration(samples=4, steps=2)
quantized = sq.quantize(
    pipeline, "w8a8", recipe="minmax", calibration=calibration, workspace=work, backend="reference"
)
quantized.save_pretrained(out)
loaded = sq.load(out, backend="reference")
images = [generate(each, make_request(each, 2), range(2), seed=0) for each in (quantized, loaded)]
assert torch.equal(*images) and bool(torch.isfinite(images[0]).all())
"""


def test_quantizing_saving_and_loading_need_no_posix(unconditional_folder, tmp_path):
    """Hidden from this library only; others have separate code for Windows."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, unconditional_folder, tmp_path / "work", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "stepquant.json").is_file()
    assert list((tmp_path / "work").glob("samples-*.safetensors")), "finished stages are stored without POSIX locks"


def test_no_module_imports_posix_modules():
    """At module level; a function may, after a check of the platform."""
    package = Path(stepquant.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not set(names) & set(POSIX_MODULES), path
