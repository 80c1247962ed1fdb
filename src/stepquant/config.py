"""What to quantize, and to how many bits: parsed and checked once, at the door."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from stepquant.errors import StepquantError

FLOAT_BITS = 16
"""Bits that mean "left in floating point"."""

_BITS_PATTERN = re.compile(r"w(\d{1,2})a(\d{1,2})")


class LayerBits(NamedTuple):
    """Bit widths of one layer: its weight and the activation that enters it; 16 means floating point."""

    weight: int
    activation: int

    @classmethod
    def parse(cls, text: str) -> LayerBits:
        """``"w4a8"`` -> ``LayerBits(4, 8)``; raises `StepquantError` for what no runtime could execute."""
        match = _BITS_PATTERN.fullmatch(text.strip().lower()) if isinstance(text, str) else None
        if match is None:
            raise StepquantError(f"bits {text!r} are not understood: write them as w4a8, w8a8, w4a4 or w4a16.")
        bits = cls(int(match[1]), int(match[2]))
        for name, value in (("weight", bits.weight), ("activation", bits.activation)):
            if value != FLOAT_BITS and not 2 <= value <= 8:
                raise StepquantError(
                    f"{name} bits of {text!r} are {value}: expected 2 to 8, or {FLOAT_BITS} for floating point."
                )
        if bits.weight == FLOAT_BITS and bits.activation != FLOAT_BITS:
            raise StepquantError(f"bits {text!r} quantize activations but not weights: no integer kernel runs that.")
        return bits

    @property
    def is_float(self) -> bool:
        return self.weight == FLOAT_BITS

    def __str__(self) -> str:
        return f"w{self.weight}a{self.activation}"


def _checked_bits(text: str) -> str:
    return str(LayerBits.parse(text))


class QuantSpec(BaseModel):
    """What every layer of a denoiser becomes.

    Attributes:
        bits: the default, as ``"w4a8"``.
        exceptions: regular expressions over module names -> bits, ``{"mid_block": "w8a8"}``; the first that is
            found in a name (``re.search``) wins, and beats `first_last_bits`.
        first_last_bits: least number of bits of the first and the last layer, weight and activation.
        first_input_bits: bits of the first layer's activation, which is the sampler's own state x_t. It has 1 to 16
            channels, so integers there save nothing, while 8 bits cost more quality than all other activations
            together (``docs/quality.md``): floating point by default.
        softmax_bits: bits of the attention probabilities (unsigned, zero point 0).
        split_skips: quantize the two halves of a skip concatenation apart (Q-Diffusion, arXiv 2302.04304);
            ``None`` leaves it to the recipe.
        balance: move what differs between an activation's channels into the weight (`stepquant.calibration.balance`);
            ``None`` leaves it to the recipe.
        exact_time: leave the layers whose input depends on the timestep alone in floating point. They are few, and
            their outputs are then those of full precision at every step.
        group_size: input channels that share a weight scale; ``None`` means one scale an output channel.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: str
    exceptions: dict[str, str] = Field(default_factory=dict)
    first_last_bits: Annotated[int, Field(ge=2, le=FLOAT_BITS)] = 8
    first_input_bits: Annotated[int, Field(ge=2, le=FLOAT_BITS)] = FLOAT_BITS
    softmax_bits: Annotated[int, Field(ge=2, le=FLOAT_BITS)] = 8
    split_skips: bool | None = None
    balance: bool | None = None
    exact_time: bool = False
    group_size: Annotated[int, Field(ge=8)] | None = None

    @field_validator("bits")
    @classmethod
    def _parse_bits(cls, value: str) -> str:
        return _checked_bits(value)

    @field_validator("exceptions")
    @classmethod
    def _parse_exceptions(cls, value: dict[str, str]) -> dict[str, str]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise StepquantError(f"exception {pattern!r} is no regular expression: {error}.") from None
        return {pattern: _checked_bits(bits) for pattern, bits in value.items()}

    @field_validator("first_last_bits", "first_input_bits", "softmax_bits")
    @classmethod
    def _integer_or_float(cls, value: int) -> int:
        if 8 < value < FLOAT_BITS:
            raise ValueError("expected 2 to 8, or 16 for floating point")
        return value

    @model_validator(mode="after")
    def _group_size_is_weight_only(self) -> QuantSpec:
        if self.group_size is not None and self.group_size & (self.group_size - 1):
            raise ValueError("group_size must be a power of two")
        return self

    @classmethod
    def parse(cls, spec: QuantSpec | str | dict) -> QuantSpec:
        """Accept a spec, a string such as ``"w4a8"``, or a dictionary of the attributes above."""
        if isinstance(spec, cls):
            return spec
        try:
            return cls.model_validate({"bits": spec} if isinstance(spec, str) else spec)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "spec"
            raise StepquantError(f"quantization spec: {where}: {first['msg']} (given: {first['input']!r}).") from None

    @property
    def default_bits(self) -> LayerBits:
        return LayerBits.parse(self.bits)

    def check_quantizes(self) -> None:
        """Raise `StepquantError` if no layer becomes integers."""
        if self.default_bits.is_float:
            raise StepquantError(f"bits {self} leave every layer in floating point: there is nothing to quantize.")

    def layer_bits(self, name: str, *, first: bool = False, last: bool = False) -> LayerBits:
        """Bits of the layer called `name` (its dotted module path in the denoiser)."""
        for pattern, exception in self.exceptions.items():
            if re.search(pattern, name):
                return LayerBits.parse(exception)
        bits = self.default_bits
        if bits.is_float or not (first or last):
            return bits
        weight, activation = max(bits.weight, self.first_last_bits), max(bits.activation, self.first_last_bits)
        if weight == FLOAT_BITS:
            return LayerBits(FLOAT_BITS, FLOAT_BITS)
        return LayerBits(weight, self.first_input_bits if first else activation)

    def __str__(self) -> str:
        return self.bits
