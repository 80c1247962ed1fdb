"""Native kernels on a CPU that lacks their instructions: emulated through SIMDe, where that is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stepquant.runtime.native import build

SIMDE = Path("/usr/include/simde/x86/avx512.h")


@contextmanager
def emulated_if_needed() -> Iterator[None]:
    """Emulate AVX-512 while the context lasts, if the CPU lacks it and SIMDe is installed."""
    with pytest.MonkeyPatch.context() as patch:
        if SIMDE.is_file() and not set(build.INSTRUCTIONS) <= build.cpu_flags():
            patch.setenv("STEPQUANT_NATIVE_EMULATE", "1")
        yield
