"""Custom functions and classes of users: loaded from ``path.py:name``, and identified by their source."""

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
"""Attribute of a module that `load_function` executed: its source, which the file may no longer contain."""


def load_function(name: str, what: str, arguments: Sequence[str] = ()) -> Callable[..., Any]:
    """Return the function or class that ``path.py:name`` names; the file is executed as a module.

    Args:
        what: what it is, for error messages.
        arguments: descriptions of the positional arguments of its call, which its signature must accept.

    Raises:
        StepquantError: if there is no such file or function, the file fails, or the function takes other arguments.
    """
    file, _, function = name.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise StepquantError(f"there is no {what} file {file!r}; expected a custom {what} as path.py:name.")
    found = getattr(_run(path, what), function, None)
    if not callable(found):
        raise StepquantError(
            f"{what} file {file} has no function {function!r}; expected the name of one that it defines."
        )
    try:
        if arguments:
            inspect.signature(found).bind(*arguments)
    except TypeError as error:
        raise StepquantError(
            f"{what} {function} of {file} does not accept {' and '.join(arguments)} alone ({first_line(error)}); "
            f"expected a function of {len(arguments)} positional arguments."
        ) from None
    except ValueError:  # callables without a signature are checked by their call only
        pass
    return found


def _run(path: Path, what: str) -> ModuleType:
    """Execute a file as a module with a unique name: pydantic and pickle look for modules in `sys.modules`."""
    name = f"{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        source = path.read_text(encoding="utf-8")
        setattr(module, _SOURCE, source)
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:  # raised by the code of the file
        del sys.modules[name]
        raise StepquantError(f"{what} file {path} cannot be run: {first_line(error)}.") from None
    return module


def source_file(thing: Any) -> str | None:
    """Return the name of the file that defines a function or class at its top level; None if there is none."""
    if "." in thing.__qualname__:
        return None
    file = getattr(sys.modules.get(thing.__module__), "__file__", None)
    return None if file is None else Path(file).name


def is_custom(thing: Any) -> bool:
    """Return whether a function or class is a user's, and not of stepquant, Python or a dependency."""
    package = getattr(thing, "__module__", "builtins").partition(".")[0]
    return package not in ("stepquant", "pydantic", "torch") and package not in sys.stdlib_module_names - {"__main__"}


def source_digest(thing: Any) -> str:
    """Return a SHA-256 that changes with the files that define a custom function or class.

    For a class this includes the files of its base classes, for a function the values of its closure. Code of stepquant
    is excluded: the package version represents it.
    """
    parts: list[Any] = []
    for part in filter(is_custom, inspect.getmro(thing) if isinstance(thing, type) else (thing,)):
        functions = [entry for entry in (part, *vars(part).values()) if isinstance(entry, FunctionType)]
        cells = [cell.cell_contents for function in functions for cell in function.__closure__ or ()]
        code = _module_source(part) or [_code(function.__code__) for function in functions]
        parts += [part.__qualname__, code, [identity(value) for value in cells if not isinstance(value, type)]]
    return digest(parts)


def identity(value: Any) -> Any:
    """Return a JSON-able stand-in for a setting in a cache key; source code identifies functions and classes."""
    if isinstance(value, partial):
        return [identity(value.func), fingerprint(value.args), fingerprint(value.keywords)]
    if isinstance(value, type | FunctionType):
        return [value.__qualname__, source_digest(value)]
    if callable(value):
        return [identity(type(value)), fingerprint(getattr(value, "__dict__", {}))]
    return fingerprint(value)


def _module_source(thing: Any) -> str | None:
    """Return the text of the file, as executed if `load_function` executed it; None for interactive code."""
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
