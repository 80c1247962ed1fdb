"""Settings with typed fields, for stages and recipes: a wrong value is a `StepquantError` of one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, get_args, get_origin

from annotated_types import Ge, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from stepquant.errors import StepquantError

Count = Annotated[int, Field(ge=0)]
"""A whole number, 0 or more."""
Positive = Annotated[int, Field(ge=1)]
"""A whole number, 1 or more."""
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""A learning rate or a weight in a sum: a finite number, 0 or more."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A probability or a share: a number from 0 to 1."""
Iterations = Annotated[int, Field(ge=0), "iterations"]
"""Optimizer steps: what an effort multiplies (`Settings.scaled`)."""


class FieldHelp(NamedTuple):
    """One field of some settings.

    Attributes:
        expected: the values it takes, in words, such as "a whole number, 0 or more".
        description: what it means, from the string below the field.
    """

    default: Any
    expected: str
    description: str


class Settings(BaseModel):
    """Base of stages and recipes: immutable, printed by `repr`, equal by value. A string below a field describes it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    kind: ClassVar[str] = "settings"
    """What the sentence about a wrong value calls an object of the class."""

    @classmethod
    def label(cls) -> str:
        """Kind and name, as in ``recipe quest``."""
        return f"{cls.kind} {cls.__name__}"

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, given: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return check(given)
        except ValidationError as error:
            if not isinstance(given, Mapping):  # not a constructor's arguments: one member of a union is tried
                raise
            raise StepquantError(cls._sentence(error)) from None

    @classmethod
    def _sentence(cls, error: ValidationError) -> str:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        if first["type"] == "extra_forbidden":
            known = ", ".join(cls.model_fields) or "none"
            return f"{cls.label()} has no hyperparameter {name!r}: it has {known}."
        if first["type"] == "missing":
            return f"{cls.label()} needs {name}."
        if name not in cls.model_fields:
            return f"{cls.label()}: {first['msg']}."
        expected = expectation(cls.model_fields[name].rebuild_annotation()) or first["msg"]
        return f"{name} of {cls.label()} is {first['input']!r}: expected {expected}."

    @classmethod
    def fields(cls) -> dict[str, FieldHelp]:
        """name -> default, what is expected and what it means, in the order of definition."""
        return {
            name: FieldHelp(
                field.get_default(call_default_factory=True),
                expectation(field.rebuild_annotation()),
                field.description or "",
            )
            for name, field in cls.model_fields.items()
        }

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, checked like new ones."""
        values: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**values | changes)

    def scaled(self, factor: float) -> Self:
        """A copy with every number of `Iterations` multiplied; those above 0 stay above 0."""
        names = [name for name, field in type(self).model_fields.items() if "iterations" in field.metadata]
        return self.replace(**{name: scaled_count(getattr(self, name), factor) for name in names})


def scaled_count(count: int, factor: float) -> int:
    """`count` times `factor`, rounded; 0 only if it was 0."""
    return max(min(count, 1), round(count * factor))


def expectation(annotation: Any) -> str:
    """The values that a field of this type takes, in words; "" where its type says it all."""
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(map(str, get_args(annotation)))}"
    if annotation is bool:
        return "True or False"
    if annotation is str:
        return "a text"
    if annotation in (int, float):
        return "a whole number" if annotation is int else "a number"
    if get_origin(annotation) is Annotated:
        base, *metadata = get_args(annotation)
        return _bounded(base, list(_constraints(metadata)))
    arguments = [argument for argument in get_args(annotation) if argument is not type(None)]
    parts = [part for part in map(expectation, arguments) if part]
    return " or ".join([*parts, "None"]) if parts and type(None) in get_args(annotation) else ""


def _constraints(metadata: Iterable[Any]) -> Iterable[Any]:
    """Constraints inside `Field`s are listed in its metadata."""
    for entry in metadata:
        yield from getattr(entry, "metadata", [entry])


def _bounded(base: Any, constraints: list[Any]) -> str:
    least = next((entry.ge for entry in constraints if isinstance(entry, Ge)), None)
    most = next((entry.le for entry in constraints if isinstance(entry, Le)), None)
    if least is None:
        return expectation(base)
    below = next((entry.lt for entry in constraints if isinstance(entry, Lt)), None)
    if below is not None:
        return f"{least} or more, and less than {below}"
    if most is not None:
        return f"a number from {least} to {most}"
    return f"a whole number, {least} or more" if base is int else f"a finite number, {least} or more"
