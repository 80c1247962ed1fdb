"""The kernels for these tests."""

from __future__ import annotations

import pytest

from stepquant.runtime import native


@pytest.fixture(scope="module")
def kernels():
    """Skip where the kernels cannot run; a source that does not compile is a failure."""
    if (reason := native.supported()) is not None:
        assert "could not compile" not in reason, reason
        pytest.skip(reason)
