"""The kernels for these tests: compiled for this CPU, or emulating the instructions that it lacks."""

from __future__ import annotations

import pytest

from stepquant.runtime import native
from tests.emulation import emulated_if_needed


@pytest.fixture(scope="module", autouse=True)
def emulation():
    """Emulate AVX-512 in this module, if the CPU lacks it."""
    with emulated_if_needed():
        yield


@pytest.fixture(scope="module")
def kernels(emulation):
    """Skip where the kernels can neither run nor be emulated; a source that does not compile is a failure."""
    if (reason := native.supported()) is not None:
        assert "could not compile" not in reason, reason
        pytest.skip(reason)
