"""A custom runtime, named as ``path.py:function`` in place of a backend's name."""

from __future__ import annotations

from stepquant.runtime import Backend, check_backend
from stepquant.user_code import load_function


def resolve_backend(name: str) -> Backend:
    """Return the name of a backend, or load the function that ``path.py:function`` names, which runs the file.

    Never call it with a name from a checkpoint.

    Raises:
        StepquantError: if the backend, file or function does not exist, the file cannot be run, or the function takes
            other arguments than a layer.
    """
    if ":" in name:
        return load_function(name, "runtime", ["a layer"])
    check_backend(name)  # here, since `prepare` is not called for full-precision models
    return name
