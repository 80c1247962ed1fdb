"""The kernels for these tests: compiled for this CPU, or emulating the instructions that it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepquant.runtime import native
from stepquant.runtime.native import build

SIMDE = Path("/usr/include/simde/x86/avx512.h")


@pytest.fixture(scope="module", autouse=True)
def emulation():
    """Emulate AVX-512 through SIMDe in this module, if the CPU lacks it and SIMDe is installed."""
    with pytest.MonkeyPatch.context() as patch:
        if SIMDE.is_file() and not set(build.INSTRUCTIONS) <= build.cpu_flags():
            patch.setenv("STEPQUANT_NATIVE_EMULATE", "1")
        yield


@pytest.fixture(scope="module")
def kernels(emulation):
    """Skip where the kernels can neither run nor be emulated; a source that does not compile is a failure."""
    if (reason := native.supported()) is not None:
        assert "could not compile" not in reason, reason
        pytest.skip(reason)
