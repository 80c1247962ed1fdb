"""Compile the kernels, and say why where they cannot run."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil

import pytest
from torch import nn

from stepquant.errors import StepquantError
from stepquant.runtime import prepare
from stepquant.runtime.native import build
from tests.runtime.test_runtimes import linear


@pytest.fixture(autouse=True)
def fresh_caches(monkeypatch, tmp_path):
    """Compile into a folder of each test, and cache nothing between tests."""
    for function in (build._load_once, build._library_path, build.cpu_flags, build.available, build.library):
        monkeypatch.setattr(build, function.__name__, function.__wrapped__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_other_cpus_are_refused(monkeypatch):
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset({"avx", "f16c"}))
    assert build.supported() == "this CPU has no AVX2 instructions"


@pytest.mark.parametrize(
    "flags, expected",
    [
        (build.AVX2, ("avx2",)),
        ((*build.AVX2, "avx_vnni"), ("avx-vnni", "avx2")),
        ((*build.AVX2, *build.AVX512), ("avx512", "avx2")),
        ((*build.AVX2, *build.AVX512, "avx_vnni"), ("avx512", "avx-vnni", "avx2")),
    ],
)
def test_instruction_sets_of_a_cpu(flags, expected, monkeypatch):
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(flags))
    assert build.available() == expected


def test_environment_limits_the_instruction_set(monkeypatch):
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset((*build.AVX2, *build.AVX512)))
    monkeypatch.setenv("STEPQUANT_INSTRUCTIONS", "avx-vnni")
    assert build.available() == ("avx2",)
    monkeypatch.setenv("STEPQUANT_INSTRUCTIONS", "sse")
    with pytest.raises(StepquantError, match="STEPQUANT_INSTRUCTIONS is 'sse'; expected one of amx, avx512"):
        build.available()


@pytest.mark.parametrize("base", [build.AVX2, build.AVX512])
def test_sources_compile_for_every_base(base, tmp_path):
    """Also where the CPU cannot execute the result."""
    if not _has_compiler():
        pytest.skip("no C++ compiler")
    build.compile_to(tmp_path / "library.so", base)


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert "this is Darwin" in build.supported()


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(build.AVX2))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.supported() == "no C++ compiler is available. Install g++"


def test_failing_compiler_leaves_no_file(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(StepquantError, match=r"could not compile the native kernels: x\.cpp:1: error: no such thing"):
        build.library()
    assert list(tmp_path.rglob("*.so")) == []


def test_failing_compiler_runs_once(monkeypatch, tmp_path):
    """However many layers ask for the kernels."""
    compiler, log = tmp_path / "c++", tmp_path / "log"
    count = f"[ $1 = --version ] || echo run >> {log}"
    compiler.write_text(f"#!/bin/sh\n{count}\necho 'x.cpp: error: broken' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(build.AVX2))
    monkeypatch.setattr(build, "_load_once", functools.cache(build._load_once))
    with pytest.warns(UserWarning, match="x.cpp: error: broken"):
        model = nn.Sequential(linear(), linear(), linear())
        prepare(model)
    reasons = [build.supported() for _ in range(3)]
    assert set(reasons) == {f"{compiler} could not compile the native kernels: x.cpp: error: broken"}
    assert log.read_text() == "run\n"


def test_compiler_that_cannot_be_executed(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_bytes(b"\x7fELF of another machine")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(StepquantError, match="cannot be executed: Exec format error"):
        build.library()


@pytest.fixture(scope="module")
def once(kernels, tmp_path_factory):
    """The library of the other tests, in a folder of this file's."""
    path = tmp_path_factory.mktemp("once") / "library.so"
    shutil.copy(build.library()._name, path)
    return path


@pytest.fixture
def compiled(once, monkeypatch, tmp_path):
    """The library's file in the cache; compiling it again copies it."""
    monkeypatch.setattr(build, "_compile", lambda _, draft: shutil.copy(once, draft))
    if build.supported() is not None:
        pytest.skip(build.supported())
    (path,) = tmp_path.rglob("*.so")
    return path


def test_compiled_once(compiled):
    path = compiled
    written = path.stat().st_mtime_ns
    assert isinstance(build.library(), ctypes.CDLL)
    assert path.stat().st_mtime_ns == written


def _has_compiler() -> bool:
    try:
        build._compiler()
    except StepquantError:
        return False
    return True


def test_library_that_does_not_load_is_compiled_again(once, monkeypatch):
    monkeypatch.setattr(build, "_compile", lambda _, draft: shutil.copy(once, draft))
    path, whole = build._library_path(build.INSTRUCTION_SETS[build.available()[0]].base), once.read_bytes()
    path.parent.mkdir(mode=0o700, parents=True)
    path.write_bytes(b"of another system")
    assert isinstance(build.library(), ctypes.CDLL)
    assert path.read_bytes() == whole


def test_library_that_never_loads(monkeypatch):
    monkeypatch.setattr(build, "_compile", lambda _, draft: draft.write_bytes(b"no library"))
    with pytest.raises(StepquantError, match=r"cannot be loaded from .*XDG_CACHE_HOME"):
        build.library()


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_folder_that_others_can_write_into_is_not_loaded_from(mode, compiled):
    """Nor is anything compiled into it."""
    compiled.parent.chmod(mode)
    assert build.supported().startswith(f"other users can write into {compiled.parent}")
    compiled.unlink()
    assert build.supported().startswith(f"other users can write into {compiled.parent}")
    assert not compiled.exists()


def test_cache_is_private(monkeypatch, compiled):
    before = os.umask(0)
    try:
        shutil.rmtree(compiled.parent)
        assert build.supported() is None
    finally:
        os.umask(before)
    assert compiled.parent.stat().st_mode & 0o777 == 0o700


def test_user_without_a_home(monkeypatch):
    monkeypatch.setattr(build, "cpu_flags", lambda: frozenset(build.AVX2))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)

    def unknown(_user):
        raise KeyError("uid not found")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    if not _has_compiler():
        pytest.skip("no C++ compiler")
    assert "XDG_CACHE_HOME" in build.supported()
