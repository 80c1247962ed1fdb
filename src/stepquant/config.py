"""The quantization spec: which layers to quantize, and to how many bits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from stepquant.errors import StepquantError

FLOAT_BITS = 16
"""Number of bits that stands for floating point."""

_BITS_PATTERN = re.compile(r"w(\d{1,2})a(\d{1,2})")
_STEPS_PATTERN = re.compile(r"(\d+(?:\.\d*)?)\s*-\s*(\d+(?:\.\d*)?)(?::(.+))?")


class LayerBits(NamedTuple):
    """Bit widths of one layer: its weight and its input activation; 16 means floating point."""

    weight: int
    activation: int

    @classmethod
    def parse(cls, text: str) -> LayerBits:
        """Parse ``"w4a8"`` to ``LayerBits(4, 8)``; raises `StepquantError` for widths that no runtime executes."""
        match = _BITS_PATTERN.fullmatch(text.strip().lower()) if isinstance(text, str) else None
        if match is None:
            raise StepquantError(f"bits {text!r} are not understood; expected for example w4a8, w8a8, w4a4 or w4a16.")
        bits = cls(int(match[1]), int(match[2]))
        for name, value in (("weight", bits.weight), ("activation", bits.activation)):
            if value != FLOAT_BITS and not 2 <= value <= 8:
                raise StepquantError(
                    f"bits {text!r} have {value} for the {name}; expected 2 to 8, or {FLOAT_BITS} for floating point."
                )
        if bits.weight == FLOAT_BITS and bits.activation != FLOAT_BITS:
            raise StepquantError(
                f"bits {text!r} quantize activations but not weights, which no kernel runs; expected quantized weights."
            )
        return bits

    @property
    def is_float(self) -> bool:
        return self.weight == FLOAT_BITS

    def __str__(self) -> str:
        return f"w{self.weight}a{self.activation}"


class Steps(NamedTuple):
    """A part of the denoising process, and the layers that are meant.

    Attributes:
        start, stop: normalized time: 0 before the first step, at pure noise, and 1 after the last. Of K steps, step k
            is at (k + 1/2) / K.
        layers: regular expression over layer names; None: all.
    """

    start: float
    stop: float
    layers: str | None

    @classmethod
    def parse(cls, text: str) -> Steps:
        """Parse ``"0.8-1"`` or ``"0.8-1:up_blocks"``; raises `StepquantError` for anything else."""
        match = _STEPS_PATTERN.fullmatch(text.strip())
        steps = cls(float(match[1]), float(match[2]), match[3]) if match else None
        if steps is None or not 0 <= steps.start < steps.stop <= 1:
            raise StepquantError(
                f"step bits are given for {text!r}; expected an interval between 0, the first step, and 1, the last, "
                "such as 0.8-1 for the last fifth of the steps, or 0.8-1:REGEX for some layers."
            )
        if steps.layers is not None:
            _check_expression("step bits", steps.layers)
        return steps

    def include(self, layer: str, time: float) -> bool:
        """Whether a layer at a time is meant."""
        return self.start <= time < self.stop and (self.layers is None or bool(re.search(self.layers, layer)))


def _check_expression(what: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise StepquantError(f"{what} {pattern!r} is not a regular expression: {error}.") from None


def _checked_bits(text: str) -> str:
    return str(LayerBits.parse(text))


class Checked(BaseModel):
    """Base of settings that users write: an invalid value raises a `StepquantError` with a message of one line.

    Subclasses validate fields; a validator of the whole model would run too late for that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    called: ClassVar[str]
    """Beginning of the error message."""

    @model_validator(mode="wrap")
    @classmethod
    def _raise_stepquant_error(cls, given: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return check(given)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            what = first["msg"].removeprefix("Value error, ")
            found = "" if first["type"] == "missing" else f" (given: {first['input']!r})"
            raise StepquantError(f"{cls.called}: {where and f'{where}: '}{what}{found}.") from None


class QuantSpec(Checked):
    """Bit widths and other choices for every layer of a denoiser.

    Attributes:
        bits: default bit widths, as ``"w4a8"``.
        overrides: regular expression over module names -> bits, as ``{"mid_block": "w8a8"}``. The first that matches
            (``re.search``) wins, also over `first_last_bits`.
        first_last_bits: minimum number of bits of the first and the last layer, weight and activation.
        first_input_bits: bits of the first layer's input, which is the noisy sample x_t. Floating point by default: it
            has 1 to 16 channels, so that integers save nothing there, while 8 bits cost more quality than all other
            activations together (``docs/results/defaults.md``).
        softmax_bits: bits of the attention probabilities (unsigned, zero point 0).
        split_skips: quantize both halves of a skip concatenation separately (Q-Diffusion, arXiv 2302.04304); ``None``
            leaves it to the recipe.
        smoothing: move differences between the channels of an activation into the weight (SmoothQuant, arXiv
            2211.10438); ``None`` leaves it to the recipe.
        exact_time: keep the layers whose input depends on the timestep alone in floating point. They are few, and their
            outputs are then those of full precision at every step.
        group_size: number of input channels that share a weight scale, and a dynamic activation scale; ``None`` for one
            scale per output channel, and for each position.
        activations: ``"static"``, ranges from calibration, or ``"dynamic"``: the range of the channels of each token or
            pixel, found while they are quantized. Dynamic ones fit better and cost more.
        step_bits: part of the denoising process, see `Steps` -> activation bits, as ``{"0.8-1": 8}``: 8 bits in the
            last fifth of the steps. The first that matches wins. They replace the activation bits of `bits`: layers of
            an override keep theirs, and first and last layers have `first_last_bits` at least.
    """

    called = "quantization spec"

    bits: str
    overrides: dict[str, str] = Field(default_factory=dict)
    first_last_bits: Annotated[int, Field(ge=2, le=FLOAT_BITS)] = 8
    first_input_bits: Annotated[int, Field(ge=2, le=FLOAT_BITS)] = FLOAT_BITS
    softmax_bits: Annotated[int, Field(ge=2, le=FLOAT_BITS)] = 8
    split_skips: bool | None = None
    smoothing: bool | None = None
    exact_time: bool = False
    group_size: Annotated[int, Field(ge=8)] | None = None
    activations: Literal["static", "dynamic"] = "static"
    step_bits: dict[str, Annotated[int, Field(ge=2, le=8)]] = Field(default_factory=dict)

    @field_validator("bits")
    @classmethod
    def _parse_bits(cls, value: str) -> str:
        return _checked_bits(value)

    @field_validator("overrides")
    @classmethod
    def _parse_overrides(cls, value: dict[str, str]) -> dict[str, str]:
        for pattern in value:
            _check_expression("override", pattern)
        return {pattern: _checked_bits(bits) for pattern, bits in value.items()}

    @field_validator("step_bits")
    @classmethod
    def _parse_steps(cls, value: dict[str, int]) -> dict[str, int]:
        for steps in value:
            Steps.parse(steps)
        return value

    @field_validator("first_last_bits", "first_input_bits", "softmax_bits")
    @classmethod
    def _integer_or_float(cls, value: int) -> int:
        if 8 < value < FLOAT_BITS:
            raise ValueError("expected 2 to 8, or 16 for floating point")
        return value

    @field_validator("group_size")
    @classmethod
    def _power_of_two(cls, value: int | None) -> int | None:
        if value is not None and value & (value - 1):
            raise ValueError("expected a power of two")
        return value

    @classmethod
    def parse(cls, spec: QuantSpec | str | dict) -> QuantSpec:
        """Accept a spec, a string such as ``"w4a8"``, or a dictionary of the attributes above."""
        return cls.model_validate({"bits": spec} if isinstance(spec, str) else spec)

    @property
    def default_bits(self) -> LayerBits:
        return LayerBits.parse(self.bits)

    def check_quantizes(self) -> None:
        """Raise `StepquantError` if no layer is quantized."""
        if self.default_bits.is_float:
            raise StepquantError(
                f"bits {self} leave every layer in floating point, so there is nothing to quantize; expected "
                "bits such as w8a8."
            )
        if self.step_bits and self.default_bits.activation == FLOAT_BITS:
            raise StepquantError(
                f"step_bits are given, but bits {self} leave activations in floating point; expected quantized "
                "activations, such as w4a4."
            )

    def layer_bits(self, name: str, *, first: bool = False, last: bool = False) -> LayerBits:
        """Return the bits of the layer called `name` (its dotted module path in the denoiser)."""
        for pattern, override in self.overrides.items():
            if re.search(pattern, name):
                return LayerBits.parse(override)
        bits = self.default_bits
        if bits.is_float or not (first or last):
            return bits
        weight, activation = max(bits.weight, self.first_last_bits), max(bits.activation, self.first_last_bits)
        if weight == FLOAT_BITS:
            return LayerBits(FLOAT_BITS, FLOAT_BITS)
        return LayerBits(weight, self.first_input_bits if first else activation)

    def bits_over_time(self, name: str, bits: int, times: Sequence[float], *, at_least: int = 2) -> list[int]:
        """Return the activation bits of a layer that has `bits` without `step_bits`, at each normalized time."""
        fixed = bits != self.default_bits.activation or any(re.search(pattern, name) for pattern in self.overrides)
        if fixed or bits == FLOAT_BITS or not self.step_bits:
            return [bits] * len(times)
        rules = [(Steps.parse(steps), other) for steps, other in self.step_bits.items()]
        found = (next((other for steps, other in rules if steps.include(name, time)), bits) for time in times)
        return [max(at_least, one) for one in found]

    def __str__(self) -> str:
        return self.bits
