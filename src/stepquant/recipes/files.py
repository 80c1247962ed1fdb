"""A recipe of one's own, named as ``path.py:function`` where a recipe's name is expected."""

from __future__ import annotations

from stepquant.recipes import Recipe, find_recipe
from stepquant.user_code import load_function


def resolve_recipe(name: str) -> Recipe:
    """The recipe called `name`, or the function of that name in a file, which is run as a module.

    Raises:
        StepquantError: if there is no such recipe, file or function, the file cannot be run, or the function
            needs more than the job: hyperparameters are keywords with defaults.
    """
    return load_function(name, "recipe", ["the job"]) if ":" in name else find_recipe(name)
