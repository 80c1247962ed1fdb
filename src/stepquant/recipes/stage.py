"""A stage of a recipe: its settings, its version, the key that its results are kept under, and what it costs."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from stepquant.calibration.model import CalibrationModel
from stepquant.calibration.samples import Calibration, CalibrationSet
from stepquant.calibration.sensitivity import Sensitivity
from stepquant.errors import StepquantError
from stepquant.files import digest, tensors_digest
from stepquant.recipes.context import Context
from stepquant.settings import Settings
from stepquant.user_code import identity, is_custom


class Workload(NamedTuple):
    """What a stage's cost follows from.

    Attributes:
        blocks, layers: number of them in the denoiser.
    """

    calibration: Calibration
    blocks: int
    layers: int


class Cost(NamedTuple):
    """What a stage takes.

    Attributes:
        what: the work in a few words.
        passes: forward passes of one sample through the whole denoiser; a backward pass counts as two.
        held: samples whose activations are in memory at once, in the whole denoiser.
        copies: copies of the denoiser's weights in float32 that are in memory beside the two that every stage has.
    """

    what: str
    passes: float
    held: float = 0.0
    copies: float = 0.0


LEARNING = 3
"""Forward passes that an iteration costs: its own, and a backward pass worth two."""


class State:
    """What the stages have made so far; reading what no stage has made raises `StepquantError`.

    Attributes:
        samples: calibration samples.
        model: the denoiser under calibration.
        ranking: how sensitive each layer is.
        critical: names of the layers chosen by that ranking.
        step_bits: `QuantSpec.step_bits` that were chosen.
        history: identities of the stages that were run.
    """

    def __init__(self, *history: Any) -> None:
        self.history: list[Any] = list(history)
        self.critical: tuple[str, ...] = ()
        self.step_bits: dict[str, int] = {}
        self._parts: dict[str, Any] = {}

    def _part(self, name: str, maker: str) -> Any:
        if name not in self._parts:
            raise StepquantError(f"a stage needs {name} that no stage before it has made: put {maker} before it.")
        return self._parts[name]

    @property
    def samples(self) -> CalibrationSet:
        samples: CalibrationSet = self._part("samples", "CollectSamples")
        return samples

    @samples.setter
    def samples(self, samples: CalibrationSet) -> None:
        self._parts["samples"] = samples

    @property
    def model(self) -> CalibrationModel:
        model: CalibrationModel = self._part("model", "AddQuantizers")
        return model

    @model.setter
    def model(self, model: CalibrationModel) -> None:
        self._parts["model"] = model

    @property
    def ranking(self) -> Sensitivity:
        ranking: Sensitivity = self._part("ranking", "RankLayers")
        return ranking

    @ranking.setter
    def ranking(self, ranking: Sensitivity) -> None:
        self._parts["ranking"] = ranking

    def digest(self) -> str:
        """Stands for everything made so far."""
        samples = self._parts.get("samples")
        model = self._parts.get("model")
        return digest(
            [
                self.history,
                samples and tensors_digest(samples.to_tensors()),
                model and tensors_digest(model.state()),
                self.critical,
            ]
        )


class Stage(Settings):
    """One step of a recipe. Subclasses add fields, and `run`.

    `version` is raised whenever the same settings begin to give other results: nothing kept by an older version is
    used again. Of a user's own stage the source counts as well.
    """

    kind: ClassVar[str] = "stage"
    version: ClassVar[int] = 1

    def run(self, context: Context, state: State) -> None:
        """Do the work: read from `state`, and write to it."""
        raise NotImplementedError

    def check(self, context: Context) -> None:
        """Raise `StepquantError` if the stage cannot work here; called before any stage runs."""

    def cost(self, workload: Workload) -> Cost:
        """What it will take."""
        return Cost(type(self).__name__, 0.0)

    def identity(self) -> Any:
        """The class, its version and source, and all settings; JSON-able."""
        settings = {name: _identity(getattr(self, name)) for name in type(self).model_fields}
        return [identity(type(self)) if is_custom(type(self)) else type(self).__name__, self.version, settings]

    def key(self, context: Context, state: State) -> str:
        """What the stage's result is kept under: changes with anything that the result depends on."""
        return f"{type(self).__name__}-{digest([context.key, self.identity(), state.digest()])[:16]}"


def _identity(value: Any) -> Any:
    if isinstance(value, Settings):
        return [type(value).__name__, {name: _identity(getattr(value, name)) for name in type(value).model_fields}]
    return identity(value)
