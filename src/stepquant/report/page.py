"""Rendering of a `Report` as one self-contained HTML file with styles, script, charts and images."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stepquant.evaluation.compare import SHADOWED
from stepquant.files import write_text
from stepquant.images import SMALLEST_SIDE, grid
from stepquant.planning import duration
from stepquant.recipes import RECIPES
from stepquant.report.content import Report
from stepquant.report.figures import line_chart, png_uri, range_map, selected_rows, sensitivity_map
from stepquant.report.inputs import MEANING
from stepquant.report.structure import ActivationRange, weights_by_bits

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclass(frozen=True)
class Part:
    """A row of a table of shares: a name, an amount, and its share of the whole, 0 to 1."""

    name: str
    amount: int
    share: float


def write(report: Report, path: Path) -> None:
    """Write the page atomically; raises `StepquantError` if that fails."""
    write_text(path, render(report))


def render(report: Report) -> str:
    """Render the page.

    Everything from the checkpoint is escaped, and a policy in the page allows only its own script and no requests.
    """
    images = report.full_precision, report.quantized
    figures = report.figures
    steps = range(1, len(figures.step_error) + 1)
    curves = [_curve(activation, report) for activation in report.activations if len(activation.scale) > 1]
    recipe, spec = (report.provenance.get(key) for key in ("recipe", "spec"))
    return render_template(
        "page.html",
        report=report,
        figures=figures,
        shadowed=SHADOWED,
        spec_bits=spec.get("bits", "") if isinstance(spec, dict) else "fewer bits",
        recipe_summary=RECIPES[recipe].summary() if isinstance(recipe, str) and recipe in RECIPES else "",
        pairs=list(zip(*([png_uri(grid(one[None])) for one in side] for side in images), strict=True)),
        small=min(report.quantized.shape[-2:]) < SMALLEST_SIDE,
        errors=line_chart(
            steps,
            figures.step_error,
            f"Error of the denoiser's output at {len(steps)} steps: {figures.step_error[0]:.2%} at the first, "
            f"{figures.step_error[-1]:.2%} at the last, {max(figures.step_error):.2%} at most.",
            "denoising step",
            "relative error",
            percent=True,
        ),
        map=range_map(report.activations, report.timesteps) if report.activations else None,
        curves=dict(curves),
        selected=_most_changing(report.activations),
        sensitivity=report.sensitivity,
        times=report.times,
        duration=duration,
        sensitivity_map=sensitivity_map(report.sensitivity) if report.sensitivity else None,
        sensitivity_meaning=MEANING[report.sensitivity.method] if report.sensitivity else "",
        layers={layer.name: layer for layer in report.layers},
        components=_parts(report.component_bytes),
        contents=_parts(report.content_bytes),
        bits=_parts({_bits(bits): count for bits, count in weights_by_bits(report.layers).items()}),
    )


def render_template(name: str, **values: Any) -> str:
    """Render a page with the style and the script of all pages: values are escaped, and a missing one is an error."""
    loader = PackageLoader("stepquant.report")
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    templates.filters |= {"size": _size, "text": _text}
    style, script = (loader.get_source(templates, source)[0] for source in ("style.css", "script.js"))
    return templates.get_template(name).render(
        style=Markup(style),
        script=Markup(script),
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
        **values,
    )


def _curve(activation: ActivationRange, report: Report) -> tuple[str, Markup]:
    rows = selected_rows(len(activation.scale))
    scale, timesteps = activation.scale[rows].tolist(), report.timesteps[rows].tolist()
    alt = (
        f"Scale of {activation.name} over the timestep: {scale[0]:.3g} at {timesteps[0]:g}, "
        f"{scale[-1]:.3g} at {timesteps[-1]:g}, between {min(scale):.3g} and {max(scale):.3g}."
    )
    return activation.name, line_chart(timesteps, scale, alt, "timestep", "scale", percent=False)


def _most_changing(activations: list[ActivationRange]) -> str | None:
    """Name of the activation whose scale changes most over time."""
    change = {one.name: float(one.scale.max() / one.scale.min()) for one in activations if len(one.scale) > 1}
    return max(change, key=lambda name: change[name], default=None)


def _parts(amounts: dict[str, int]) -> list[Part]:
    whole = sum(amounts.values()) or 1
    return [Part(name, amount, amount / whole) for name, amount in amounts.items()]


def _bits(bits: int | None) -> str:
    return "floating point" if bits is None else f"{bits} bits"


def _size(size: float) -> str:
    """Bytes with three significant digits and a unit."""
    unit = next((unit for unit in ("kB", "MB") if size / UNITS[unit] < 1000), "GB")
    value = size / UNITS[unit]
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} {unit}"


def _text(value: Any) -> str:
    """A JSON value for readers: the entries of an object, anything else as it is."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, str):
        return value
    return "default" if value is None else json.dumps(value)
