"""What a recipe is: hyperparameters with typed fields, presets of them, and the stages they are for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

from stepquant.calibration.model import CalibrationModel
from stepquant.errors import StepquantError
from stepquant.optimize.reconstruction import GPTQ, AdaRound, LearnScales
from stepquant.recipes.context import Context
from stepquant.recipes.stage import Stage, State
from stepquant.recipes.stages import ReconstructBlocks, Smooth
from stepquant.settings import Iterations, Positive, Settings, Weight
from stepquant.user_code import identity, is_custom


class Recipe(Settings):
    """A way to quantize. Subclasses have hyperparameters as fields, and `stages`.

    Attributes:
        PRESETS: name -> hyperparameters that differ from the defaults.
    """

    kind: ClassVar[str] = "recipe"
    name: ClassVar[str] = ""
    """Where recipes are named; a class without one goes by its own name."""
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"fast": {}}

    @classmethod
    def label(cls) -> str:
        return f"recipe {cls.called()}"

    @classmethod
    def called(cls) -> str:
        """The recipe's name."""
        return str(cls.__dict__.get("name") or cls.__name__)

    @classmethod
    def summary(cls) -> str:
        """One line on what the recipe does."""
        return (inspect.getdoc(cls) or "").partition("\n")[0]

    @classmethod
    def preset(cls, name: str) -> Self:
        """The recipe with the hyperparameters of a preset; raises `StepquantError` if there is none of that name."""
        if name not in cls.PRESETS:
            raise StepquantError(f"preset of {cls.label()} is {name!r}: expected one of {', '.join(cls.PRESETS)}.")
        return cls(**cls.PRESETS[name])

    def with_effort(self, factor: float) -> Self:
        """The recipe with every number of iterations multiplied."""
        return self.scaled(factor)

    def stages(self) -> list[Stage]:
        """The algorithm, step by step."""
        raise NotImplementedError

    def checked_stages(self) -> list[Stage]:
        """`stages`; raises `StepquantError` if there is something else among them."""
        stages = self.stages()
        for stage in stages:
            if not isinstance(stage, Stage):
                raise StepquantError(f"{self.label()} has the stage {stage!r}: expected objects of the class Stage.")
        return stages


class BlockRecipe(Recipe):
    """Base of the recipes that reconstruct block by block."""

    iterations: Iterations = 500
    """Optimizer steps per block."""
    batch_size: Positive = 16
    """Samples per optimizer step."""
    rounding: Literal["gptq", "adaround"] = "gptq"
    """How weights below 8 bits are rounded: in closed form before scales are learned, or learned with them."""
    rounding_rate: Weight = 3e-2
    """Learning rate of AdaRound's variables."""
    rounding_weight: Weight = 0.1
    """Weight of AdaRound's regularizer, relative to the block's error before learning."""
    scale_rate: Weight = 1e-3
    """Learning rate of activation scales, relative to their size."""

    def reconstruct(self, **settings: Any) -> ReconstructBlocks:
        """The stage with these hyperparameters; further `settings` of it come first."""
        given = {"scales": LearnScales(rate=self.scale_rate)} | settings
        return ReconstructBlocks(
            iterations=self.iterations,
            batch_size=self.batch_size,
            rounding=rounding_method(self.rounding, self.rounding_rate, self.rounding_weight),
            **given,
        )


def rounding_method(name: str, rate: float, regularizer: float) -> GPTQ | AdaRound:
    """The rounding called `name`; rate and regularizer are AdaRound's."""
    return AdaRound(rate=rate, regularizer=regularizer) if name == "adaround" else GPTQ()


class Effort(NamedTuple):
    """Calibration samples, denoising steps they come from, and what iterations are multiplied by."""

    samples: int
    steps: int
    factor: float


EFFORTS: dict[str, Effort] = {
    "quick": Effort(64, 20, 0.1),
    "standard": Effort(256, 50, 1.0),
    "thorough": Effort(1024, 100, 4.0),
}


def find_effort(name: str) -> Effort:
    """The effort of that name; raises `StepquantError` naming those there are."""
    if name not in EFFORTS:
        raise StepquantError(f"effort {name!r} is unknown; expected one of {', '.join(EFFORTS)}.")
    return EFFORTS[name]


def run_recipe(recipe: Recipe, context: Context) -> CalibrationModel:
    """Run the stages of a recipe; returns the denoiser's copy with everything frozen.

    Raises:
        StepquantError: if a stage cannot work here, before any has run; or the recipe makes no model.
    """
    stages = recipe.checked_stages()
    for stage in stages:
        stage.check(context)
    if context.spec.smoothing and not any(isinstance(stage, Smooth) for stage in stages):
        raise StepquantError(f"the spec sets smoothing, but {recipe.label()} has no stage Smooth. Leave smoothing out.")
    state = State(*([identity(type(recipe))] if is_custom(type(recipe)) else []))
    for stage in stages:
        stage.run(context, state)
        state.history.append(stage.identity())
    return state.model
