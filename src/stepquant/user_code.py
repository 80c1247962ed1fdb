"""A function of the user's own, named as ``path.py:function``."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stepquant.errors import StepquantError, first_line


def load_function(name: str, what: str, arguments: Sequence[str] = ()) -> Callable[..., Any]:
    """The function called `name` in a file, which is run as a module.

    Args:
        what: it is, for the sentence that says what is wrong.
        arguments: what it will be called with, in words; it must take as many, and need no others.

    Raises:
        StepquantError: if there is no such file or function, the file cannot be run, or the function takes something
            else.
    """
    file, _, function = name.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise StepquantError(f"there is no {what} file {file!r}: write a {what} of your own as path.py:function.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise StepquantError(f"{what} file {file} cannot be run: {first_line(error)}.") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise StepquantError(f"{what} file {file} has no function {function!r}.")
    try:
        if arguments:
            inspect.signature(found).bind(*arguments)
    except TypeError as error:
        raise StepquantError(
            f"{what} {function} of {file} is called with {' and '.join(arguments)} alone, "
            f"which it does not take: {first_line(error)}."
        ) from None
    except ValueError:  # a callable without a signature shows only in the call what it takes
        pass
    return found
