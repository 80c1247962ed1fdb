"""Recipes: a paper each, as one page composed of the shared stages."""

from __future__ import annotations

import inspect
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from stepquant.errors import StepquantError
from stepquant.recipes.eda_dm import eda_dm
from stepquant.recipes.job import Job, Recipe
from stepquant.recipes.minmax import minmax
from stepquant.recipes.pqd import pqd
from stepquant.recipes.ptq4dm import ptq4dm
from stepquant.recipes.q_diffusion import q_diffusion
from stepquant.recipes.quest import quest
from stepquant.recipes.tdq import tdq
from stepquant.recipes.tfmq import tfmq

RECIPES: dict[str, Recipe] = {
    "minmax": minmax,
    "ptq4dm": ptq4dm,
    "q-diffusion": q_diffusion,
    "pqd": pqd,
    "tdq": tdq,
    "eda-dm": eda_dm,
    "tfmq": tfmq,
    "quest": quest,
}


def find_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of that name, or the function itself; raises `StepquantError` naming those there are."""
    if callable(recipe):
        return recipe
    if recipe not in RECIPES:
        raise StepquantError(f"unknown recipe {recipe!r}: expected one of {', '.join(RECIPES)}.")
    return RECIPES[recipe]


def name_of(recipe: str | Recipe) -> str:
    """What to call a recipe."""
    return recipe if isinstance(recipe, str) else getattr(recipe, "__name__", type(recipe).__name__)


def summary(name: str) -> str:
    """One line on what a recipe does."""
    return (inspect.getdoc(find_recipe(name)) or "").partition("\n")[0]


def hyperparameters(recipe: str | Recipe, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """A recipe's hyperparameters: its defaults, overridden by `given`.

    Raises:
        StepquantError: if `given` names one that the recipe does not have, or has a value of the wrong kind.
    """
    function, name = find_recipe(recipe), name_of(recipe)
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    values = {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    for key, value in (given or {}).items():
        if key not in values:
            known = ", ".join(values) or "none"
            raise StepquantError(f"recipe {name} has no hyperparameter {key!r}: it has {known}.")
        if value is None and values[key] is None:
            continue
        is_number = isinstance(values[key], int | float) or float in get_args(hints.get(key))
        if is_number:
            whole, least = type(values[key]) is int, int(key == "batch_size")
            fits = type(value) is int if whole else isinstance(value, int | float)
            if not fits or not least <= value < math.inf:
                kind = "whole number" if whole else "finite number"
                raise StepquantError(f"{key} of recipe {name} is {value!r}: expected a {kind}, {least} or more.")
        choices = hints[key].__args__ if get_origin(hints.get(key)) is Literal else None
        if choices is not None and value not in choices:
            raise StepquantError(f"{key} of recipe {name} is {value!r}: expected one of {', '.join(choices)}.")
        values[key] = value
    return values


__all__ = ["RECIPES", "Job", "Recipe", "find_recipe", "hyperparameters", "name_of", "summary"]
