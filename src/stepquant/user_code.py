"""A user's own functions and classes: loaded from ``path.py:name``, and known by their source."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from stepquant.errors import StepquantError, first_line
from stepquant.files import digest, fingerprint

_SOURCE = "__stepquant_source__"
"""Attribute of a module that `load_function` ran: the text it was run from, which the file may no longer hold."""


def load_function(name: str, what: str, arguments: Sequence[str] = ()) -> Callable[..., Any]:
    """The function or class called `name` in a file, which is run as a module.

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
    found = getattr(_run(path, what), function, None)
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


def _run(path: Path, what: str) -> ModuleType:
    """Run a file as a module of a name of its own: pydantic and pickle look for modules in `sys.modules`."""
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        source = path.read_text()
        setattr(module, _SOURCE, source)
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:  # whatever the file does
        del sys.modules[name]
        raise StepquantError(f"{what} file {path} cannot be run: {first_line(error)}.") from None
    return module


def source_file(thing: Any) -> str | None:
    """Name of the file that has a function or class at its top level, without the folder; None if none has."""
    if "." in thing.__qualname__:
        return None
    file = getattr(sys.modules.get(thing.__module__), "__file__", None)
    return None if file is None else Path(file).name


def is_custom(thing: Any) -> bool:
    """Whether a function or class is a user's, and not of stepquant, Python or a library of ours."""
    package = getattr(thing, "__module__", "builtins").partition(".")[0]
    return package not in ("stepquant", "pydantic", "torch") and package not in sys.stdlib_module_names - {"__main__"}


def source_digest(thing: Any) -> str:
    """SHA-256 that changes when a user's function or class does, or anything else in the files that define it.

    Of a class the files of its base classes count as well; of a function also the values it closes over. What is
    stepquant's own counts as unchanged: the version of the package stands for it.
    """
    parts: list[Any] = []
    for part in filter(is_custom, inspect.getmro(thing) if isinstance(thing, type) else (thing,)):
        functions = [entry for entry in (part, *vars(part).values()) if isinstance(entry, FunctionType)]
        cells = [cell.cell_contents for function in functions for cell in function.__closure__ or ()]
        code = _module_source(part) or [_code(function.__code__) for function in functions]
        parts += [part.__qualname__, code, [identity(value) for value in cells if not isinstance(value, type)]]
    return digest(parts)


def identity(value: Any) -> Any:
    """Stands for a setting in a cache key, JSON-able: of functions and classes the source counts, not the place."""
    if isinstance(value, partial):
        return [identity(value.func), fingerprint(value.args), fingerprint(value.keywords)]
    if isinstance(value, type | FunctionType):
        return [value.__qualname__, source_digest(value)]
    if callable(value):
        return [identity(type(value)), fingerprint(getattr(value, "__dict__", {}))]
    return fingerprint(value)


def _module_source(thing: Any) -> str | None:
    """The text of the file, as it was run if stepquant ran it; None for what was typed at a prompt."""
    module = sys.modules.get(thing.__module__)
    if module is None or hasattr(module, _SOURCE):
        return getattr(module, _SOURCE, None)
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return None


def _code(code: CodeType) -> list[Any]:
    constants = [_code(entry) if isinstance(entry, CodeType) else repr(entry) for entry in code.co_consts]
    return [code.co_code.hex(), constants, list(code.co_names)]
