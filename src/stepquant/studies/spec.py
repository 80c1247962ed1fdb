"""What a study is: a TOML file, checked at the door, and the cells it stands for."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator

from stepquant.calibration.samples import Calibration
from stepquant.config import Checked, QuantSpec
from stepquant.errors import StepquantError, first_line
from stepquant.files import digest
from stepquant.loading import ZOO_PREFIX, locate
from stepquant.recipes import hyperparameters
from stepquant.recipes.files import resolve_recipe

PICTURES_PER_SEED = 10_000
"""Image i of seed s starts from noise ``s * PICTURES_PER_SEED + i``: seeds share no image, so that the deviation
between them is that of independent draws. Calibration images are numbered alike, from their own offset."""


class Budget(Checked):
    """What each cell is judged by.

    Attributes:
        count: images compared with those of full precision, and inputs of the denoiser at each of their steps.
        steps: denoising steps.
        frechet_count: images of the distribution's figures, where there is a classifier; by default `count`.
    """

    called = "evaluation"

    count: PositiveInt = 16
    steps: PositiveInt = 20
    frechet_count: PositiveInt | None = None

    @property
    def images(self) -> int:
        return max(self.count, self.frechet_count or 0)


class Options(Checked):
    """What `stepquant.quantize` can do with any recipe.

    Attributes:
        spec: attributes of the `QuantSpec` besides its bits, such as ``{"smoothing": True}``.
        budget: mean weight bits, or None.
        correction: whether the output is corrected.
    """

    called = "options"

    spec: dict[str, Any] = Field(default_factory=dict)
    budget: float | None = None
    correction: bool = False


class Cell(BaseModel):
    """One quantization of one model, and its judgement.

    Attributes:
        model: as the study names it.
        bits: such as ``w4a8``.
        label: what the study calls the recipe with these arguments; not part of the cell's identity.
        recipe: a recipe's name, or ``path.py:function``.
        arguments: all its hyperparameters, defaults included.
        seed: of everything random.
        guidance: scale of classifier-free guidance; None leaves it to the pipeline.
        options: besides the recipe.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    bits: str
    label: str
    recipe: str
    arguments: dict[str, Any]
    seed: int
    guidance: float | None
    calibration: Calibration
    evaluation: Budget
    options: Options = Options()

    @property
    def identity(self) -> str:
        """Equal for two cells whose results are the same, whatever study they are in."""
        plain = {"label"} if self.options != Options() else {"label", "options"}
        return digest(self.model_dump(mode="json", exclude=plain))

    @property
    def spec(self) -> QuantSpec:
        """Bits and options as one; raises `StepquantError` for an option that there is not."""
        return QuantSpec.parse({"bits": self.bits, **self.options.spec})

    @property
    def noise(self) -> int:
        """Number of the noise that the first image starts from."""
        return self.seed * PICTURES_PER_SEED

    @property
    def source(self) -> str:
        """The model as `stepquant.loading` takes it."""
        return source_of(self.model)


class Study(Checked):
    """A grid of cells.

    Attributes:
        models: zoo names, folders or hub ids.
        bits: such as ``["w8a8", "w4a8"]``.
        seeds: each draws other images and calibrates on others.
        evaluation: what each cell is judged by.
        calibration: the same for each cell.
        guidance: model -> scale of classifier-free guidance.
        recipes: label -> hyperparameters; ``recipe`` among them names the recipe where the label does not, a function
            in a file as ``"path.py:function"``; a table ``calibration`` among them changes the study's for this one,
            and a table ``options`` holds `Options`.
        pairs: labels of a recipe and of what it is compared with, seed by seed, in the table of pairs.
    """

    called = "study"

    models: Annotated[list[str], Field(min_length=1)]
    bits: Annotated[list[str], Field(min_length=1)]
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    recipes: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    evaluation: Budget = Budget()
    calibration: Calibration = Calibration()
    guidance: dict[str, float] = Field(default_factory=dict)
    pairs: list[tuple[str, str]] = Field(default_factory=list)

    @field_validator("pairs")
    @classmethod
    def _of_recipes(cls, pairs: list[tuple[str, str]], given: ValidationInfo) -> list[tuple[str, str]]:
        for label in itertools.chain(*pairs):
            if label not in given.data.get("recipes", ()):
                raise ValueError(f"{label!r} is not among the recipes")
        return pairs

    def cells(self) -> Iterator[Cell]:
        """Seeds outermost, then bits, models and recipes: a study that is stopped early has whole tables of few seeds.

        Raises:
            StepquantError: for a recipe, hyperparameter, model or bits that do not exist.
        """
        recipes = {label: self._recipe(label, given) for label, given in self.recipes.items()}
        for bits in self.bits:
            QuantSpec.parse(bits)
        for model in self.models:
            locate(source_of(model))
        for seed in self.seeds:
            for bits in self.bits:
                for model in self.models:
                    for label, (recipe, arguments, calibration, options) in recipes.items():
                        cell = Cell(
                            model=model,
                            bits=bits,
                            label=label,
                            recipe=recipe,
                            arguments=arguments,
                            seed=seed,
                            guidance=self.guidance.get(model),
                            calibration=calibration,
                            evaluation=self.evaluation,
                            options=options,
                        )
                        _ = cell.spec  # a wrong option is said before the first cell runs
                        yield cell

    def _recipe(self, label: str, given: dict[str, Any]) -> tuple[str, dict[str, Any], Calibration, Options]:
        """Name, full hyperparameters, calibration and options of an entry of `recipes`."""
        arguments = dict(given)
        name = arguments.pop("recipe", label)
        if not isinstance(name, str):
            raise StepquantError(f"recipe {label!r} of the study: recipe is {name!r}: expected its name.")
        tables = {key: arguments.pop(key, {}) for key in ("calibration", "options")}
        for key, table in tables.items():
            if not isinstance(table, dict):
                raise StepquantError(f"recipe {label!r} of the study: {key} is {table!r}: expected a table.")
        try:
            calibration = Calibration.parse(self.calibration.model_dump() | tables["calibration"])
            options = Options.model_validate(tables["options"])
        except StepquantError as error:
            raise StepquantError(f"recipe {label!r} of the study: {error}") from None
        return name, hyperparameters(resolve_recipe(name), arguments), calibration, options

    def only(
        self,
        models: Collection[str] | None = None,
        bits: Collection[str] | None = None,
        seeds: Collection[int] | None = None,
        recipes: Collection[str] | None = None,
    ) -> Study:
        """The part of the study that is asked for; None is all.

        Raises:
            StepquantError: for something the study does not have.
        """
        labels = _chosen("recipe", list(self.recipes), recipes)
        return self.model_copy(
            update={
                "models": _chosen("model", self.models, models),
                "bits": _chosen("bits", self.bits, bits),
                "seeds": _chosen("seed", self.seeds, seeds),
                "recipes": {label: self.recipes[label] for label in labels},
                "pairs": [pair for pair in self.pairs if set(pair) <= set(labels)],
            }
        )


def read_study(path: Path) -> Study:
    """Read a study; raises `StepquantError` naming what is wrong in the file."""
    try:
        return Study.model_validate(tomllib.loads(path.read_text()))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StepquantError(f"study {path} cannot be read: {first_line(error)}.") from None
    except StepquantError as error:
        raise StepquantError(f"{path}: {error}") from None


def source_of(model: str) -> str:
    """A plain name is one of the zoo's; anything with a slash or a colon is a folder, a hub id or ``zoo:NAME``."""
    return model if "/" in model or ":" in model else ZOO_PREFIX + model


def _chosen(what: str, known: list[Any], wanted: Collection[Any] | None) -> list[Any]:
    for value in wanted or ():
        if value not in known:
            expected = ", ".join(str(entry) for entry in known)
            raise StepquantError(f"the study has no {what} {value!r}: expected one of {expected}.")
    return [value for value in known if not wanted or value in wanted]
