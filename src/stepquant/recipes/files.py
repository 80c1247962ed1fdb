"""A recipe of one's own, named as ``path.py:function`` where a recipe's name is expected."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from stepquant.errors import StepquantError, first_line
from stepquant.recipes import Recipe, find_recipe


def resolve_recipe(name: str) -> Recipe:
    """The recipe called `name`, or the function of that name in a file, which is run as a module.

    Raises:
        StepquantError: if there is no such recipe, file or function, or the file cannot be run.
    """
    file, colon, function = name.rpartition(":")
    if not colon:
        return find_recipe(name)
    path = Path(file)
    if path.suffix != ".py" or not path.is_file():
        raise StepquantError(f"there is no recipe file {file!r}: write a recipe of your own as path.py:function.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file does
        raise StepquantError(f"recipe file {file} cannot be run: {first_line(error)}.") from None
    recipe = getattr(module, function, None)
    if not callable(recipe):
        raise StepquantError(f"recipe file {file} has no function {function!r}.")
    return recipe
