"""Compile the kernels for this machine, once, and load them.

What is compiled is named by a hash of the sources, the flags and the compiler, so a new version never loads an old
library. It is kept under ``$XDG_CACHE_HOME/stepquant`` (``~/.cache/stepquant``).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from stepquant.errors import StepquantError
from stepquant.runtime.native.library import declare
from stepquant.workspace import write_atomic

SOURCE = Path(__file__).with_name("source")
COMPILERS = ("c++", "g++", "clang++")
INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-mavx512f", "-mavx512bw", "-mavx512vl",
    "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c",
)  # fmt: skip


def supported() -> str | None:
    """None if the kernels can run here; else the reason why not."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"the native kernels are for Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    missing = [name for name in INSTRUCTIONS if name not in _processor_flags()]
    if missing:
        return f"the processor has no {missing[0].replace('_', '-').upper()} instructions"
    if _library_path() is None:
        return "no C++ compiler was found: install g++"
    try:
        library()
    except StepquantError as error:
        return str(error)
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        StepquantError: if there is no compiler, or it fails.
    """
    path = _library_path()
    if path is None:
        raise StepquantError("no C++ compiler was found: install g++.")
    if not path.is_file():
        compile_to(path)
    return declare(ctypes.CDLL(str(path)))


@functools.cache
def has_amx() -> bool:
    """Whether the processor multiplies tiles of int8, and the system lets this process do so."""
    return "amx_int8" in _processor_flags() and bool(library().sq_request_amx())


def compile_to(path: Path) -> None:
    """Compile the sources to the shared library `path`, whole or not at all. Raises `StepquantError`."""
    write_atomic(path, _compile)


def _compile(draft: Path) -> None:
    compiler = _compiler()
    assert compiler is not None
    sources = sorted(str(source) for source in SOURCE.glob("*.cpp"))
    process = subprocess.run(
        [compiler, *FLAGS, *sources, "-o", str(draft)], capture_output=True, text=True, check=False
    )
    if process.returncode != 0:
        reason = next((line for line in process.stderr.splitlines() if "error" in line), "it gave no reason")
        raise StepquantError(f"{compiler} could not compile the native kernels: {reason.strip()}")


@functools.cache
def _library_path() -> Path | None:
    compiler = _compiler()
    if compiler is None:
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    content = [version, *FLAGS, *(path.read_text() for path in sorted(SOURCE.iterdir()) if path.is_file())]
    name = hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "stepquant" / f"native-{name}.so"


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    candidates = (named, *COMPILERS) if named else COMPILERS
    return next((found for name in candidates if (found := shutil.which(name))), None)


@functools.cache
def _processor_flags() -> frozenset[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())
