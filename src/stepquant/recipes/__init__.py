"""Recipes: one page per paper, composed of shared stages. Public as ``stepquant.recipes``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepquant.calibration.samples import Calibration
from stepquant.errors import StepquantError
from stepquant.recipes.auto import Auto
from stepquant.recipes.context import Context
from stepquant.recipes.eda_dm import EDADM
from stepquant.recipes.minmax import MinMax
from stepquant.recipes.pqd import PQD
from stepquant.recipes.ptq4dm import PTQ4DM
from stepquant.recipes.q_diffusion import QDiffusion
from stepquant.recipes.qat import QAT
from stepquant.recipes.quest import QuEST
from stepquant.recipes.recipe import EFFORTS, BlockRecipe, Recipe, find_effort
from stepquant.recipes.stage import Stage, State
from stepquant.recipes.tdq import TDQ
from stepquant.recipes.tfmq import TFMQ
from stepquant.user_code import load_function

RECIPES: dict[str, type[Recipe]] = {
    recipe.name: recipe for recipe in (Auto, MinMax, PTQ4DM, QDiffusion, PQD, TDQ, EDADM, TFMQ, QuEST)
}


DEFAULT = "q-diffusion"
"""Name of the recipe that is used if none is given, nor a target."""


def with_target(
    recipe: str | type[Recipe] | Recipe | None, target: Mapping[str, float | str] | None
) -> tuple[str | type[Recipe] | Recipe, dict[str, Any]]:
    """The recipe that is meant, and the hyperparameters that stand for a target.

    Args:
        recipe: None: `auto` if there is a target, else `DEFAULT`.
        target: ``"psnr"`` -> dB, ``"size"`` -> size relative to float32, a number or a text such as ``"0.2x"``.

    Raises:
        StepquantError: for anything else as a target, or one that the recipe does not have.
    """
    if target is None:
        return DEFAULT if recipe is None else recipe, {}
    chosen = Auto.name if recipe is None else recipe
    if chosen not in (Auto.name, Auto) and not isinstance(chosen, Auto):
        raise StepquantError(f"recipe {chosen!r} has no target. Leave out `target`, or use the recipe auto.")
    values = {}
    for name, value in target.items():
        try:
            values[name] = {"psnr": float, "size": _fraction}[name](value)  # type: ignore[operator]
        except (KeyError, ValueError):
            raise StepquantError(f"target is {name}={value}; expected psnr=DB, such as 30, or size=0.2x.") from None
    return chosen, values


def _fraction(value: float | str) -> float:
    """``"0.2x"`` -> 0.2."""
    return float(value.removesuffix("x")) if isinstance(value, str) else float(value)


def find_recipe(
    recipe: str | type[Recipe] | Recipe,
    preset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    effort: str = "standard",
) -> Recipe:
    """A recipe with all its hyperparameters.

    Args:
        recipe: a name in `RECIPES`, a class in a file as ``path.py:ClassName``, a class, or an object.
        preset: of a name or class: ``"fast"``, the default, or ``"paper"``.
        overrides: hyperparameters with other values than preset and effort give them.
        effort: multiplies every number of iterations, see `EFFORTS`; ``"thorough"`` is the published budget of the
            preset ``"paper"``, which the others do a part of.

    Raises:
        StepquantError: for a recipe, preset, hyperparameter or effort that there is not.
    """
    found = recipe if isinstance(recipe, Recipe) else find_class(recipe).preset(preset or "fast")
    if isinstance(recipe, Recipe) and preset is not None:
        raise StepquantError(
            f"preset is {preset!r}, but the recipe has its hyperparameters already: give {recipe.called()} by name."
        )
    chosen = find_effort(effort)
    factor = chosen.factor if published_calibration(recipe, preset) is None else chosen.share
    return found.with_effort(factor).replace(**overrides or {})


def published_calibration(recipe: str | type[Recipe] | Recipe, preset: str | None) -> Calibration | None:
    """The calibration that a recipe's preset fixes, at its whole budget; None where it is up to the effort."""
    return None if isinstance(recipe, Recipe) or preset != "paper" else find_class(recipe).PUBLISHED


def find_class(recipe: str | type[Recipe] | Recipe) -> type[Recipe]:
    """The class of a recipe; raises `StepquantError` if there is none of that name."""
    found: Any = type(recipe) if isinstance(recipe, Recipe) else recipe
    if isinstance(recipe, str):
        if ":" not in recipe and recipe not in RECIPES:
            raise StepquantError(f"unknown recipe {recipe!r}: expected one of {', '.join(RECIPES)}, or path.py:Class.")
        found = RECIPES.get(recipe) or load_function(recipe, "recipe")
    if not isinstance(found, type) or not issubclass(found, Recipe):
        raise StepquantError(f"recipe {recipe!r} is not a subclass of stepquant.recipes.Recipe.")
    return found


__all__ = [
    "EDADM",
    "EFFORTS",
    "PQD",
    "PTQ4DM",
    "QAT",
    "RECIPES",
    "TDQ",
    "TFMQ",
    "Auto",
    "BlockRecipe",
    "Context",
    "MinMax",
    "QDiffusion",
    "QuEST",
    "Recipe",
    "Stage",
    "State",
    "find_class",
    "find_effort",
    "find_recipe",
    "published_calibration",
]
