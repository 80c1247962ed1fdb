"""Definition of a study: a validated TOML file, and its cells."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_serializer,
)
from pydantic.functional_serializers import SerializerFunctionWrapHandler

from stepquant.calibration.samples import Calibration
from stepquant.config import Checked, QuantSpec
from stepquant.errors import StepquantError, first_line
from stepquant.files import digest
from stepquant.loading import ZOO_PREFIX, locate
from stepquant.provenance import plain
from stepquant.recipes import find_class

IMAGES_PER_SEED = 10_000
"""Image i of seed s starts from noise ``s * IMAGES_PER_SEED + i``: seeds share no image, so that they are independent.
Calibration images are numbered in the same way, from an offset."""


class Budget(Checked):
    """Size of the evaluation of each cell.

    Attributes:
        count: images to compare with full precision, and inputs of the denoiser at each of their steps.
        steps: denoising steps.
        frechet_count: images for the Frechet distance, where there is a classifier; by default `count`.
    """

    called = "evaluation"

    count: PositiveInt = 16
    steps: PositiveInt = 20
    frechet_count: PositiveInt | None = None

    @property
    def images(self) -> int:
        return max(self.count, self.frechet_count or 0)


class Options(Checked):
    """Options of `stepquant.quantize` that combine with any recipe.

    Attributes:
        spec: attributes of the `QuantSpec` besides its bits, such as ``{"smoothing": True}``.
        budget: mean weight bits, or None.
        activation_budget: mean activation bits, or None.
        correction: whether to correct the output.
    """

    called = "options"

    spec: dict[str, Any] = Field(default_factory=dict)
    budget: float | None = None
    activation_budget: float | None = None
    correction: bool = False

    @model_serializer(mode="wrap")
    def _without_default(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Results that were stored before `activation_budget` stay those of their cells."""
        return {name: value for name, value in serialize(self).items() if (name, value) != ("activation_budget", None)}


class Cell(BaseModel):
    """One quantization of one model, and its evaluation.

    Attributes:
        model: name in the study.
        bits: such as ``w4a8``.
        label: name of the recipe with these arguments in the study; not part of the cell's identity.
        recipe: a recipe's name, or ``path.py:ClassName``.
        arguments: all hyperparameters, defaults included.
        seed: seed of all random choices.
        guidance: scale of classifier-free guidance; None leaves it to the pipeline.
        options: options besides the recipe.
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
        """Digest of everything that determines the result, equal in all studies."""
        excluded = {"label"} if self.options != Options() else {"label", "options"}
        return digest(self.model_dump(mode="json", exclude=excluded))

    @property
    def spec(self) -> QuantSpec:
        """Bits and options; raises `StepquantError` for an unknown option."""
        return QuantSpec.parse({"bits": self.bits, **self.options.spec})

    @property
    def noise(self) -> int:
        """Number of the noise of the first image."""
        return self.seed * IMAGES_PER_SEED

    @property
    def source(self) -> str:
        """The model as an argument of `stepquant.loading`."""
        return source_of(self.model)


class Study(Checked):
    """A grid of cells.

    Attributes:
        models: zoo names, folders or hub ids.
        bits: such as ``["w8a8", "w4a8"]``.
        seeds: each generates other images and calibrates on others.
        evaluation: size of the evaluation.
        calibration: calibration of each cell.
        guidance: model -> scale of classifier-free guidance.
        recipes: label -> hyperparameters; ``recipe`` among them names the recipe where the label does not, a class
            in a file as ``"path.py:ClassName"``; ``preset`` its preset, and ``share`` the part of its iterations that
            is done; a table ``calibration`` among them changes the study's for this one, and a table ``options`` holds
            `Options`.
        pairs: labels of a recipe and its baseline, compared seed by seed in the table of pairs.
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
        """Iterate over seeds, then bits, models and recipes: a study that stops early has full tables of few seeds.

        Raises:
            StepquantError: for an unknown recipe, hyperparameter or model, or invalid bits.
        """
        recipes = {label: self._recipe(label, given) for label, given in self.recipes.items()}
        for bits in self.bits:
            QuantSpec.parse(bits)
        for model in self.models:
            locate(source_of(model))
        for seed, bits, model, label in itertools.product(self.seeds, self.bits, self.models, recipes):
            recipe, arguments, calibration, options = recipes[label]
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
            _ = cell.spec  # reports an invalid option before the first cell runs
            yield cell

    def _recipe(self, label: str, given: dict[str, Any]) -> tuple[str, dict[str, Any], Calibration, Options]:
        """Name, full hyperparameters, calibration and options of an entry of `recipes`."""
        arguments = dict(given)
        name = arguments.pop("recipe", label)
        if not isinstance(name, str):
            raise StepquantError(f"recipe {label!r} of the study: recipe is {name!r}; expected its name.")
        tables = {key: arguments.pop(key, {}) for key in ("calibration", "options")}
        preset, share = arguments.pop("preset", None), arguments.pop("share", 1)
        for key, table in tables.items():
            if not isinstance(table, dict):
                raise StepquantError(f"recipe {label!r} of the study: {key} is {table!r}; expected a table.")
        try:
            calibration = Calibration.parse(self.calibration.model_dump() | tables["calibration"])
            options = Options.model_validate(tables["options"])
        except StepquantError as error:
            raise StepquantError(f"recipe {label!r} of the study: {error}") from None
        whole = find_class(name).preset(preset or "fast")
        return name, plain(whole.scaled(_checked_share(label, share)).replace(**arguments)), calibration, options

    def only(
        self,
        models: Collection[str] | None = None,
        bits: Collection[str] | None = None,
        seeds: Collection[int] | None = None,
        recipes: Collection[str] | None = None,
    ) -> Study:
        """Select a part of the study; None selects all.

        Raises:
            StepquantError: for a value that the study does not have.
        """
        labels = _select("recipe", list(self.recipes), recipes)
        return self.model_copy(
            update={
                "models": _select("model", self.models, models),
                "bits": _select("bits", self.bits, bits),
                "seeds": _select("seed", self.seeds, seeds),
                "recipes": {label: self.recipes[label] for label in labels},
                "pairs": [pair for pair in self.pairs if set(pair) <= set(labels)],
            }
        )


def read_study(path: Path) -> Study:
    """Read a study; raises `StepquantError` for an invalid file."""
    try:
        return Study.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StepquantError(f"study {path} cannot be read: {first_line(error)}.") from None
    except StepquantError as error:
        raise StepquantError(f"{path}: {error}") from None


def source_of(model: str) -> str:
    """A plain name is a zoo model; anything with a slash or a colon is a folder, a hub id or ``zoo:NAME``."""
    return model if "/" in model or ":" in model else ZOO_PREFIX + model


def _checked_share(label: str, share: Any) -> float:
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise StepquantError(
            f"recipe {label!r} of the study: share is {share!r}; expected a number above 0, at most 1."
        )
    return share


def _select(what: str, available: list[Any], selected: Collection[Any] | None) -> list[Any]:
    for value in selected or ():
        if value not in available:
            expected = ", ".join(map(str, available))
            raise StepquantError(f"the study has no {what} {value!r}; expected one of {expected}.")
    return [value for value in available if not selected or value in selected]
