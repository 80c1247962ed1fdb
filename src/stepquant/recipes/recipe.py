"""What a recipe is: hyperparameters with typed fields, presets of them, and the stages they are for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Self

from stepquant.calibration.fake_quant.weight_quantizers import LeastError, RoundToNearest
from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.samples import Calibration
from stepquant.errors import StepquantError
from stepquant.layers.install import Quantization
from stepquant.optimize.reconstruction import GPTQ, AdaRound, LearnScales
from stepquant.recipes.context import Context
from stepquant.recipes.stage import Stage, State
from stepquant.recipes.stages import ReconstructBlocks, Smooth
from stepquant.settings import Iterations, Positive, Settings, Weight
from stepquant.user_code import identity, is_custom


class Row(NamedTuple):
    """One hyperparameter in all presets of a recipe.

    Attributes:
        values: in the order of the presets.
        expected: the values it takes, in words.
    """

    name: str
    values: tuple[str, ...]
    description: str
    expected: str

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1


class Recipe(Settings):
    """A way to quantize. Subclasses have hyperparameters as fields, and `stages`.

    Attributes:
        PRESETS: name -> hyperparameters that differ from the defaults.
    """

    kind: ClassVar[str] = "recipe"
    name: ClassVar[str] = ""
    """Where recipes are named; a class without one goes by its own name."""
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"fast": {}}
    PUBLISHED: ClassVar[Calibration | None] = None
    """The calibration of the preset ``"paper"`` at its whole budget."""

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

    @classmethod
    def compared(cls) -> list[Row]:
        """Hyperparameters and calibration of every preset, at the whole budget of ``"paper"``."""
        recipes = [cls.preset(name) for name in cls.PRESETS]
        rows = [
            Row(name, tuple(str(getattr(recipe, name)) for recipe in recipes), field.description, field.expected)
            for name, field in cls.fields().items()
        ]
        if cls.PUBLISHED is None:
            return rows
        for name, description in (("samples", "Calibration samples."), ("steps", "Denoising steps they come from.")):
            values = (
                str(getattr(cls.PUBLISHED if preset == "paper" else Calibration(), name)) for preset in cls.PRESETS
            )
            rows.append(Row(name, tuple(values), description, "a whole number, 1 or more"))
        return rows

    def with_effort(self, factor: float) -> Self:
        """The recipe with every number of iterations multiplied."""
        return self.scaled(factor)

    @property
    def raises(self) -> bool:
        """Whether bits are raised, when the recipe has run, until the check's floor or the target holds."""
        return False

    @property
    def target(self) -> float | None:
        """Fidelity to reach, dB; None: the check's floor."""
        return None

    def search(self, context: Context) -> tuple[Self, Context]:
        """Decide what is left open by measuring; returns the recipe and the context, with its spec, that are run."""
        return self, context

    def accept(self, context: Context, quantization: Quantization) -> None:
        """Look at what came of it; raises `StepquantError` if that is not what was asked for."""

    def fitted(self, context: Context) -> Self:
        """The recipe with the hyperparameters decided that depend on the model or the bits."""
        return self

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
    """Weight of AdaRound's regularizer, relative to the block's error before learning; if `published`, in the plain
    loss."""
    scale_rate: Weight = 1e-3
    """Learning rate of activation scales, relative to their size; if `published`, in their own units."""
    published: bool = False
    """Follow the public code: its loss, scales learned in their own units, 8-bit weights rounded like the others, in
    ranges of least error; and where the recipe says so, its order of steps."""

    def reconstruct(self, **settings: Any) -> ReconstructBlocks:
        """The stage with these hyperparameters; further `settings` of it come first."""
        rate, weight = self.rounding_rate, self.rounding_weight
        given = {
            "iterations": self.iterations,
            "batch_size": self.batch_size,
            "rounding": rounding_method(self.rounding, rate, weight, published=self.published),
            "scales": LearnScales(rate=self.scale_rate, relative=not self.published),
        }
        return ReconstructBlocks(**given | settings)

    @property
    def weights(self) -> type[RoundToNearest]:
        """How weights are rounded before they are learned."""
        return LeastError if self.published else RoundToNearest


def rounding_method(name: str, rate: float, regularizer: float, *, published: bool = False) -> GPTQ | AdaRound:
    """The rounding called `name`; rate and regularizer are AdaRound's."""
    if name == "gptq":
        return GPTQ()
    return published_adaround(rate, regularizer) if published else AdaRound(rate=rate, regularizer=regularizer)


def published_adaround(rate: float, regularizer: float, *, decay: bool = False) -> AdaRound:
    """AdaRound as in the public code of BRECQ and QDrop, of 8-bit weights, too."""
    return AdaRound(rate=rate, regularizer=regularizer, below=9, published=True, decay=decay)


class Effort(NamedTuple):
    """How much is done.

    Attributes:
        samples, steps: calibration samples, and denoising steps they come from.
        factor: what iterations of our own variants are multiplied by.
        share: what published iterations are multiplied by.
    """

    samples: int
    steps: int
    factor: float
    share: float

    def calibration(self, published: Calibration | None) -> dict[str, int]:
        """Samples and steps; of a published calibration, the part that this effort is of a thorough one."""
        if published is None:
            return {"samples": self.samples, "steps": self.steps}
        part = self.samples / EFFORTS["thorough"].samples
        steps, samples = min(self.steps, published.steps), max(1, round(published.samples * part))
        images = published.trajectories or published.samples
        return {"samples": samples, "steps": steps, "trajectories": max(1, round(images * part))}


EFFORTS: dict[str, Effort] = {
    "quick": Effort(64, 20, 0.1, 0.005),
    "standard": Effort(256, 50, 1.0, 0.1),
    "thorough": Effort(1024, 100, 4.0, 1.0),
}


def find_effort(name: str) -> Effort:
    """The effort of that name; raises `StepquantError` naming those there are."""
    if name not in EFFORTS:
        raise StepquantError(f"effort {name!r} is unknown; expected one of {', '.join(EFFORTS)}.")
    return EFFORTS[name]


def check_recipe(recipe: Recipe, context: Context) -> list[Stage]:
    """Return the stages of a recipe; raises `StepquantError` if one cannot work here, or the spec does not fit."""
    stages = recipe.fitted(context).checked_stages()
    for stage in stages:
        stage.check(context)
    if context.spec.smoothing and not any(isinstance(stage, Smooth) for stage in stages):
        raise StepquantError(f"the spec sets smoothing, but {recipe.label()} has no stage Smooth. Leave smoothing out.")
    return stages


def run_recipe(recipe: Recipe, context: Context) -> CalibrationModel:
    """Run the stages of a recipe; returns the denoiser's copy with everything frozen.

    Raises:
        StepquantError: as `check_recipe`, before a stage has run; or if the recipe makes no model.
    """
    stages = check_recipe(recipe, context)
    state = State(*([identity(type(recipe))] if is_custom(type(recipe)) else []))
    for stage in stages:
        stage.run(context, state)
        state.history.append(stage.identity())
    return state.model
