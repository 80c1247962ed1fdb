"""Compiling the kernels, and refusing to where they cannot run."""

from __future__ import annotations

import ctypes

import pytest

from stepquant.errors import StepquantError
from stepquant.runtime.native import build


@pytest.fixture(autouse=True)
def fresh_caches(monkeypatch, tmp_path):
    """Each test compiles into a folder of its own, and leaves no answer to the next."""
    for function in (build.library, build._library_path, build._processor_flags):
        monkeypatch.setattr(build, function.__name__, function.__wrapped__)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_other_processors_are_refused(monkeypatch):
    monkeypatch.setattr(build, "_processor_flags", lambda: frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"}))
    assert build.supported() == "the processor has no AVX512-VNNI instructions"


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert "this is Darwin" in build.supported()


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_processor_flags", lambda: frozenset(build.INSTRUCTIONS))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.supported() == "no C++ compiler was found: install g++"


def test_compiler_that_fails_leaves_nothing(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(StepquantError, match=r"could not compile the native kernels: x\.cpp:1: error: no such thing"):
        build.library()
    assert list(tmp_path.rglob("native-*")) == []


@pytest.mark.skipif(build._compiler() is None, reason="no C++ compiler")
def test_compiled_once(monkeypatch, tmp_path):
    if build.supported() is not None:
        pytest.skip(build.supported())
    (path,) = tmp_path.rglob("native-*.so")
    written = path.stat().st_mtime_ns
    assert isinstance(build.library(), ctypes.CDLL)
    assert path.stat().st_mtime_ns == written


def test_the_sources_compile_where_they_can(monkeypatch):
    """Without this a broken source would only skip the tests of the kernels."""
    if build._compiler() is None or not set(build.INSTRUCTIONS) <= build._processor_flags():
        pytest.skip("no compiler, or not the instructions")
    assert build.supported() is None
