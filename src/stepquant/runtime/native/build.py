"""Compile the kernels for this machine once, and load them.

The shared library is named by a hash of the sources, the flags and the compiler, so a new version never loads an old
one. It is cached in ``$XDG_CACHE_HOME/stepquant/native`` (default: ``~/.cache/stepquant/native``) and loaded only if no
other user can write into that folder, because loading executes it.

For tests only: with ``STEPQUANT_NATIVE_EMULATE=1`` the kernels are compiled for any x86-64 CPU with AVX2 and emulate
AVX-512 through SIMDe (the Debian package ``libsimde-dev``). They compute the same, many times slower.
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

from stepquant.errors import StepquantError, first_line
from stepquant.files import cannot_write, write_atomic
from stepquant.runtime.native.library import declare

SOURCE = Path(__file__).with_name("source")
COMPILERS = ("c++", "g++", "clang++")
INSTRUCTIONS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni")
FLAGS = ("-std=c++17", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-mfma", "-mf16c")
NATIVE_FLAGS = ("-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni")
EMULATION_FLAGS = ("-O1", "-mavx2", "-DSTEPQUANT_EMULATE")


def emulated() -> bool:
    """Whether the kernels emulate the instructions that this CPU may lack: for tests only."""
    return os.environ.get("STEPQUANT_NATIVE_EMULATE") == "1"


def supported() -> str | None:
    """None if the kernels can run here, else the reason."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"the native kernels are for Linux on x86-64, this is {platform.system()} on {platform.machine()}"
    missing = [name for name in INSTRUCTIONS if name not in cpu_flags()]
    if missing and not emulated():
        return f"this CPU has no {missing[0].replace('_', '-').upper()} instructions"
    try:
        library()
    except StepquantError as error:
        return str(error).removesuffix(".")
    return None


def library() -> ctypes.CDLL:
    """The compiled kernels. A failure is remembered: every layer asks, and a compiler takes seconds to fail.

    Raises:
        StepquantError: if there is no compiler, it fails, or the library can neither be cached nor loaded.
    """
    loaded = _load_once()
    if isinstance(loaded, str):
        raise StepquantError(loaded)
    return loaded


@functools.cache
def _load_once() -> ctypes.CDLL | str:
    """The library, or the message of the error."""
    try:
        return _load()
    except StepquantError as error:
        return str(error)


def _load() -> ctypes.CDLL:
    path = _library_path()
    if path.is_file():
        _check_owned(path.parent)
    else:
        compile_to(path)
    try:
        return declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError):  # for example, of another system
        path.unlink(missing_ok=True)
    compile_to(path)
    try:
        return declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise StepquantError(
            f"the native kernels cannot be loaded from {path}: {first_line(error)}. Set XDG_CACHE_HOME to a folder "
            "that programs may run from."
        ) from None


@functools.cache
def has_amx() -> bool:
    """Whether the CPU has AMX tiles of int8 and the operating system lets this process use them."""
    return "amx_int8" in cpu_flags() and not emulated() and bool(library().sq_request_amx())


def compile_to(path: Path) -> None:
    """Compile the sources to the shared library `path`, atomically; raises `StepquantError`."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path.parent, error) from None
    _check_owned(path.parent)
    write_atomic(path, _compile)


def _check_owned(folder: Path) -> None:
    """Raise `StepquantError` if another user than this one may write into `folder`."""
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StepquantError(
            f"other users can write into {folder}, and the native kernels in it would be executed. Remove it, or set "
            "XDG_CACHE_HOME to a folder that only you can write into."
        )


def _flags() -> tuple[str, ...]:
    return (*FLAGS, *(EMULATION_FLAGS if emulated() else NATIVE_FLAGS))


def _compile(draft: Path) -> None:
    compiler = _compiler()
    sources = sorted(str(source) for source in SOURCE.glob("*.cpp"))
    process = _run(compiler, *_flags(), *sources, "-o", str(draft))
    if process.returncode != 0:
        reason = next((line for line in process.stderr.splitlines() if "error" in line), "it gave no reason")
        raise StepquantError(f"{compiler} could not compile the native kernels: {reason.strip()}")


def _run(compiler: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run([compiler, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise StepquantError(f"the C++ compiler {compiler} cannot be executed: {error.strerror}.") from None


@functools.cache
def _library_path() -> Path:
    """Path of the cached library; raises `StepquantError` without a compiler or a folder for the cache."""
    version = _run(_compiler(), "--version").stdout
    content = [
        version,
        *_flags(),
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
