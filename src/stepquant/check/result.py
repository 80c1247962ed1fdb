"""Result of checking a quantization on held-out samples, and what it says below the floor.

The floor, in dB of PSNR, follows the bits of activations: 30 at 8 bits or in floating point, 25 at 6, 20 at 4
(``docs/quality.md``). Of audio and of recorded calls the signal-to-noise ratio counts, which is some 10 dB lower than
the PSNR of the same error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.layers.install import Quantization

OnLowQuality = Literal["warn", "raise-bits", "error"]
SHOWN = 3
"""Layers, and overrides, that the sentence names."""
USUAL_NAMES = ("unet", "transformer", "denoiser")
"""Denoisers that need no name in a sentence."""


@dataclass(frozen=True)
class Mend:
    """Bits that bring a denoiser above the floor.

    Attributes:
        component: name of the denoiser.
        overrides: of the spec: regular expression -> other bits, as ``"w8a16"``; empty if it is all activations that
            become dynamic instead.
        decibels: fidelity with these bits, measured.
        quantization: with these bits.
    """

    component: str
    overrides: dict[str, str]
    decibels: float
    quantization: Quantization

    def __str__(self) -> str:
        """What to do, and what it gives."""
        gives = f"{'give' if len(self.overrides) > 1 else 'gives'} {self.decibels:.1f} dB"
        of = "" if self.component in USUAL_NAMES else f" of {self.component}"
        if not self.overrides:
            return f'`activations="dynamic"`{of} {gives}'
        if len(self.overrides) > SHOWN:
            raised = f"raises {len(self.overrides)} parts{of} to {next(iter(self.overrides.values()))}"
            return f'`on_low_quality="raise-bits"` {raised}, which gives {self.decibels:.1f} dB'
        overrides = " and ".join(f"`override` '{regex}={bits}'" for regex, bits in self.overrides.items())
        return f"{overrides}{of} {gives}"


@dataclass(frozen=True)
class Diagnosis:
    """Where the error of a quantization comes from.

    Attributes:
        parts: layers, or modules around them, of the largest error, largest first.
        steps: first and last step of the group of steps with the largest error; None if there are no groups.
        mend: what mends it, if something does.
    """

    parts: tuple[str, ...]
    steps: tuple[int, int] | None
    mend: Mend | None


@dataclass(frozen=True)
class Check:
    """Fidelity on held-out samples.

    Attributes:
        decibels: of each sample: PSNR of images and video, signal-to-noise ratio of anything else.
        measure: ``"PSNR"`` or ``"SNR"``.
        floor: in decibels of the same kind.
        steps: of each sample.
        step_error: component -> relative L2 error of its output at each step along the full-precision trajectory.
        diagnosis: of a fidelity below the floor.
    """

    decibels: tuple[float, ...]
    measure: str
    floor: float
    steps: int
    step_error: dict[str, list[float]]
    diagnosis: Diagnosis | None = None

    @property
    def mean(self) -> float:
        return sum(self.decibels) / len(self.decibels)

    @property
    def holds(self) -> bool:
        return self.mean >= self.floor

    def __str__(self) -> str:
        """One line without the diagnosis."""
        what = "image" if self.measure == "PSNR" else "sample"
        return (
            f"{self.mean:.1f} dB {self.measure} to full precision, the worst of {len(self.decibels)} held-out {what}s "
            f"{min(self.decibels):.1f} dB ({self.steps} steps, floor {self.floor:g} dB)"
        )

    def record(self) -> dict[str, Any]:
        """For the provenance, JSON-able."""
        worst = {name: max(range(len(errors)), key=errors.__getitem__) for name, errors in self.step_error.items()}
        entries = {
            "summary": str(self),
            "measure": self.measure,
            "decibels": [round(value, 2) for value in self.decibels],
            "floor": self.floor,
            "steps": self.steps,
            "step_error": {name: [round(error, 5) for error in errors] for name, errors in self.step_error.items()},
            "worst_step": worst or None,
            "warning": None if self.holds else self.sentence(),
        }
        return {name: value for name, value in entries.items() if value is not None}

    def sentence(self) -> str:
        """What a user of a quantization below the floor has to know, in one sentence."""
        text = f"low quality: {self}"
        found = self.diagnosis
        if found is None:
            return f"{text}."
        text += f"; the layers to blame are {_listed(found.parts)}{_at(found.steps)}"
        if found.mend is None:
            return f"{text}; other bits of a few layers do not mend it. Use more bits, or another recipe."
        return f"{text}; {found.mend}."


class Policy(NamedTuple):
    """What to do about a low quality.

    Attributes:
        mode: as the user says.
        raises: whether bits are raised first.
        target: fidelity in dB that counts in place of the floor; None: the floor.
    """

    mode: OnLowQuality
    raises: bool
    target: float | None


def make_policy(
    on_low_quality: str, *, check: bool, correction: bool, raises: bool = False, target: float | None = None
) -> Policy:
    """Check what the user says.

    Args:
        raises: whether the recipe raises bits in any mode; it does not after a correction was estimated.
        target: of the recipe.

    Raises:
        StepquantError: for an unknown mode, or one that does not go with the rest.
    """
    modes: tuple[OnLowQuality, ...] = get_args(OnLowQuality)
    if on_low_quality not in modes:
        raise StepquantError(f"on_low_quality is {on_low_quality!r}; expected one of {', '.join(modes)}.")
    mode = modes[modes.index(on_low_quality)]
    asked = "a target psnr" if target is not None else f'on_low_quality="{mode}"'
    if (target is not None or mode != "warn") and not check:
        raise StepquantError(f"{asked} needs the check. Leave out `check`.")
    if (target is not None or mode == "raise-bits") and correction:
        raise StepquantError(f"{asked} changes the denoiser that `correction` was estimated on. Leave out one.")
    return Policy(mode, mode == "raise-bits" or (raises and not correction), target)


def floor_of(specs: Sequence[QuantSpec], measure: str) -> float:
    """Decibels that a quantization at these bits is expected to reach."""
    bits = min(min(spec.default_bits.activation, 8) for spec in specs)
    return 30.0 - 2.5 * (8 - bits) - (0.0 if measure == "PSNR" else 10.0)


def _at(steps: tuple[int, int] | None) -> str:
    """Where most of the error arises."""
    if steps is None:
        return ""
    first, last = steps
    return f", mostly at step {first}" if first == last else f", mostly at steps {first} to {last}"


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
