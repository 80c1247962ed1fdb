"""Compile the kernels for this machine once, and load them.

The shared library is named by a hash of the sources, the flags and the compiler, so a new version never loads an old
one. It is cached in ``$XDG_CACHE_HOME/stepquant/native`` (default: ``~/.cache/stepquant/native``) and loaded only if no
other user can write into that folder, because loading executes it.

There is one library for CPUs with AVX-512 and one for those with AVX2; both use further instructions where the CPU has
them. The environment variable ``STEPQUANT_INSTRUCTIONS`` names the best set to use, one of `INSTRUCTION_SETS`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
from pathlib import Path
from typing import NamedTuple

from stepquant.errors import StepquantError, first_line
from stepquant.files import cannot_write, write_atomic
from stepquant.runtime.native.library import declare

SOURCE = Path(__file__).with_name("source")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-mfma", "-mf16c")
AVX2, AVX512 = ("avx2", "fma", "f16c"), ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")


class InstructionSet(NamedTuple):
    """Instructions that kernels may use.

    Attributes:
        base: what the library is compiled for, as flags of the CPU.
        extension: flag of the CPU for instructions that single functions use in addition; or None.
        code: `Extension` in ``source/product.h``.
    """

    base: tuple[str, ...]
    extension: str | None = None
    code: int = 0


INSTRUCTION_SETS = {
    "amx": InstructionSet(AVX512, "amx_int8", 1),
    "avx512": InstructionSet(AVX512),
    "avx-vnni": InstructionSet(AVX2, "avx_vnni", 2),
    "avx2": InstructionSet(AVX2),
}
"""Name -> instruction set, the fastest first."""


@functools.cache
def available() -> tuple[str, ...]:
    """The `INSTRUCTION_SETS` that this CPU has, the fastest first, from ``STEPQUANT_INSTRUCTIONS`` on.

    Raises:
        StepquantError: if the variable names none.
    """
    names, best = list(INSTRUCTION_SETS), os.environ.get("STEPQUANT_INSTRUCTIONS", "amx")
    if best not in names:
        raise StepquantError(f"STEPQUANT_INSTRUCTIONS is {best!r}; expected one of {', '.join(names)}.")
    return tuple(name for name in names[names.index(best) :] if _has(INSTRUCTION_SETS[name]))


def _has(instructions: InstructionSet) -> bool:
    if not {*instructions.base, instructions.extension} - {None} <= cpu_flags():
        return False
    # Linux lets a process use the registers of AMX after it has requested them.
    return instructions.extension != "amx_int8" or bool(_library(instructions.base).sq_request_amx())


def supported() -> str | None:
    """None if the kernels can run here, else the reason."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"the native kernels are for Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    try:
        if not available():
            return "this CPU has no AVX2 instructions"
        library()
    except StepquantError as error:
        return str(error).removesuffix(".")
    return None


@functools.cache
def library(instructions: str | None = None) -> ctypes.CDLL:
    """The compiled kernels for an instruction set, by default the fastest that is `available`.

    A failure is remembered: every layer asks, and a compiler takes seconds to fail.

    Raises:
        StepquantError: if there is no compiler, it fails, or the library can neither be cached nor loaded.
    """
    return _library(INSTRUCTION_SETS[instructions or available()[0]].base)


def _library(base: tuple[str, ...]) -> ctypes.CDLL:
    loaded = _load_once(base)
    if isinstance(loaded, str):
        raise StepquantError(loaded)
    return loaded


@functools.cache
def _load_once(base: tuple[str, ...]) -> ctypes.CDLL | str:
    """The library, or the message of the error."""
    try:
        return _load(base)
    except StepquantError as error:
        return str(error)


def _load(base: tuple[str, ...]) -> ctypes.CDLL:
    path = _library_path(base)
    if path.is_file():
        _check_owned(path.parent)
    else:
        compile_to(path, base)
    try:
        return declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError):  # for example, of another system
        path.unlink(missing_ok=True)
    compile_to(path, base)
    try:
        return declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise StepquantError(
            f"the native kernels cannot be loaded from {path}: {first_line(error)}. Set XDG_CACHE_HOME to a folder "
            "that programs may run from."
        ) from None


def compile_to(path: Path, base: tuple[str, ...]) -> None:
    """Compile the sources for CPUs with `base` to the shared library `path`, atomically; raises `StepquantError`."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path.parent, error) from None
    _check_owned(path.parent)
    write_atomic(path, functools.partial(_compile, base))


def _check_owned(folder: Path) -> None:
    """Raise `StepquantError` if another user than this one may write into `folder`."""
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StepquantError(
            f"other users can write into {folder}, and the native kernels in it would be executed. Remove it, or set "
            "XDG_CACHE_HOME to a folder that only you can write into."
        )


def _flags(base: tuple[str, ...]) -> tuple[str, ...]:
    return (*FLAGS, *(f"-m{flag.replace('_', '')}" for flag in base))


def _compile(base: tuple[str, ...], draft: Path) -> None:
    compiler = _compiler()
    sources = sorted(str(source) for source in SOURCE.glob("*.cpp"))
    process = _run(compiler, *_flags(base), *sources, "-o", str(draft))
    if process.returncode != 0:
        reason = next((line for line in process.stderr.splitlines() if "error" in line), "it gave no reason")
        raise StepquantError(f"{compiler} could not compile the native kernels: {reason.strip()}")


def _run(compiler: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise StepquantError(f"the C++ compiler {compiler} cannot be executed: {error.strerror}.") from None


@functools.cache
def _library_path(base: tuple[str, ...]) -> Path:
    """Path of the cached library; raises `StepquantError` without a compiler or a folder for the cache."""
    version = _run(_compiler(), "--version").stdout
    content = [
        version,
        *_flags(base),
        *(path.read_text(encoding="utf-8") for path in sorted(SOURCE.iterdir()) if path.is_file()),
    ]
    name = hashlib.sha256("\0".join(content).encode()).hexdigest()[:16]
    return _cache() / "stepquant" / "native" / f"{name}.so"


def _cache() -> Path:
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError:  # a user whom the system does not know, as in some containers
        raise StepquantError(
            "no home folder is available to cache the compiled native kernels. Set XDG_CACHE_HOME to a folder."
        ) from None


def _compiler() -> str:
    named = os.environ.get("CXX")
    candidates = (named, *COMPILERS) if named else COMPILERS
    for name in candidates:
        if (found := shutil.which(name)) is not None:
            return found
    raise StepquantError("no C++ compiler is available. Install g++.")


@functools.cache
def cpu_flags() -> frozenset[str]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())
