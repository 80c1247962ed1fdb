"""A custom runtime, named as ``path.py:function`` in place of a backend's name."""

from __future__ import annotations

from stepquant.runtime import Backend, check_backend
from stepquant.user_code import load_function


def resolve_backend(name: str) -> Backend:
    """`name` itself, or the function of that name in a file, which is run as a module.

    Never called with what a checkpoint says.

    Raises:
        StepquantError: if there is no such backend, file or function, the file cannot be run, or the function
            needs more than a layer.
    """
    if ":" in name:
        return load_function(name, "runtime", ["a layer"])
    check_backend(name)  # a model in full precision has no layer to prepare, where the name would be checked
    return name
