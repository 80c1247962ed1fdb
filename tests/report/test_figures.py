from __future__ import annotations

import re
from base64 import b64decode
from io import BytesIO

import matplotlib
import pytest
import torch
from PIL import Image

from stepquant.report.figures import line_chart, pareto, range_map, scatter, selected_rows, sensitivity_map
from stepquant.report.inputs import LayerSensitivity, SensitivityFile
from stepquant.report.structure import ActivationRange

DARKEST, BRIGHTEST = (matplotlib.colormaps["magma"](end, bytes=True)[:3] for end in (0.0, 1.0))


def _curve(svg: str) -> list[tuple[float, float]]:
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--accent\); stroke-width: 1.5', svg)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.e]+) ([-\d.e]+)", path)]


def _texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def _size(svg: str) -> tuple[float, float]:
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
    return float(width), float(height)


def _pixels(uri: str) -> Image.Image:
    return Image.open(BytesIO(b64decode(uri.removeprefix("data:image/png;base64,"))))


def _row(uri: str) -> list[tuple[int, ...]]:
    image = _pixels(uri)
    assert image.height == 1
    return [image.getpixel((column, 0)) for column in range(image.width)]


def test_a_curve_is_linear_in_its_values():
    chart = line_chart([1, 2, 3], [0.0, 0.5, 1.0], "in words", "step", "error", percent=True)
    (x0, y0), (x1, y1), (x2, y2) = _curve(chart)
    assert x1 - x0 == pytest.approx(x2 - x1) == pytest.approx(abs(x2 - x0) / 2)
    assert y0 - y1 == pytest.approx(y1 - y2)
    assert y0 > y2, "larger values are higher"
    assert {"0 %", "100 %", "step", "error"} <= set(_texts(chart))
    assert 'role="img" aria-label="in words"' in chart


def test_time_can_run_backwards():
    chart = line_chart([900, 300, 0], [1.0, 1.0, 1.0], "", "", "", percent=False)
    (left, _), (middle, _), (right, _) = _curve(chart)
    assert (middle - left) / (right - left) == pytest.approx(2 / 3)
    labels = [text for text in _texts(chart) if text in ("800", "0")]
    assert sorted(labels) == ["0", "0", "800"], "one of each axis, and the largest timestep"


def test_more_than_a_decade_is_logarithmic():
    chart = line_chart([1, 2, 3], [0.01, 0.1, 1.0], "", "", "", percent=True)
    (_, y0), (_, y1), (_, y2) = _curve(chart)
    assert y0 - y1 == pytest.approx(y1 - y2)
    assert {"1 %", "2 %", "5 %", "10 %", "50 %", "100 %"} <= set(_texts(chart))


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [3.7], [1e-12, 1e12], [5.0, 5.0], [0.0, 1e-9]])
@pytest.mark.filterwarnings("error")
def test_unusual_values_stay_inside(values):
    chart = line_chart(range(len(values)), values, "", "", "", percent=False)
    width, height = _size(chart)
    points = _curve(chart)
    assert len(points) == len(values)
    assert all(0 <= x <= width and 0 <= y <= height for x, y in points)


def test_the_front_is_what_none_dominates():
    costs, qualities = [1.0, 2.0, 3.0, 2.5, 1.0], [10.0, 30.0, 20.0, 30.0, 9.0]
    assert pareto(costs, qualities) == [0, 1]
    assert pareto([1.0, 1.0], [5.0, 5.0]) == [0, 1], "two equal models do not dominate each other"
    chart = scatter(costs, qualities, list("abcde"), "MB", "dB")
    assert set("abcde") <= set(_texts(chart))
    assert "better than a, b" in chart


def test_labels_are_text_whatever_they_contain():
    label = "a$b$ $\\frac{ </text><script>"
    chart = scatter([1.0], [30.0], [label], "MB", "dB")
    assert "a$b$ $\\frac{ &lt;/text&gt;&lt;script&gt;" in _texts(chart)
    assert "<script" not in chart


def test_thousands_are_written_out():
    assert {"0", "500", "1000", "1500"} <= set(_texts(scatter([700.0, 1600.0], [30.0, 40.0], ["a", "b"], "ms", "dB")))


@pytest.mark.parametrize(("costs", "qualities"), [([1.0], [30.0]), ([2.0, 2.0], [30.0, 30.0]), ([0.001], [-3.0])])
@pytest.mark.filterwarnings("error")
def test_few_and_equal_models_stay_inside(costs, qualities):
    chart = scatter(costs, qualities, ["m"] * len(costs), "MB", "dB")
    width, height = _size(chart)
    places = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: var\(--accent\)', chart)
    assert len(places) == len(costs)
    assert all(0 < float(x) < width and 0 < float(y) < height for x, y in places)


def test_a_map_has_a_pixel_per_layer_and_step_in_the_order_of_sampling():
    rising = torch.tensor([1.0, 10.0, 100.0]) / 255
    static = torch.tensor([10.0]) / 255
    drawn = range_map([ActivationRange("a", 8, rising), ActivationRange("b", 8, static)], torch.tensor([0.0, 5.0, 9.0]))
    strips = [_row(strip) for strip in drawn.colorings[0].strips]
    # The largest range is at the last timestep, where sampling begins: left.
    assert strips[0][0] == BRIGHTEST
    assert strips[0][2] == DARKEST
    assert strips[1] == [strips[0][1]] * 3
    assert drawn.notes == ["1 to 100", "10"]
    assert drawn.columns == ["9", "5", "0"]
    assert {"1", "10", "100"} <= set(_texts(drawn.colorings[0].legend))


def test_changes_are_relative_to_the_row():
    scales = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([100.0, 200.0, 300.0])]
    drawn = range_map([ActivationRange("a", 8, scale) for scale in scales], torch.arange(3.0))
    strips = [_row(strip) for strip in drawn.colorings[1].strips]
    assert strips[0] == strips[1]
    assert strips[0][1] == matplotlib.colormaps["RdBu_r"](0.5, bytes=True)[:3], "the mean is neutral"


def test_static_tables_need_one_column():
    drawn = range_map([ActivationRange("a", 8, torch.ones(1))], torch.zeros(1))
    assert [len(_row(strip)) for strip in drawn.colorings[0].strips] == [1]
    assert len(drawn.colorings) == 1
    assert drawn.columns == []


def test_a_map_of_errors_is_brightest_where_they_are_largest():
    layers = [
        LayerSensitivity(name="a", bits="w4a8", error=0.5, errors=[1.0, 1e-4]),
        LayerSensitivity(name="b", bits="w4a8", error=-0.1, errors=[-0.1, 1e-9]),
    ]
    measured = SensitivityFile(method="leave-one-out", samples=4, step_groups=[(0, 4), (5, 5)], layers=layers)
    drawn = sensitivity_map(measured)
    assert [_row(strip) for strip in drawn.colorings[0].strips] == [[BRIGHTEST, DARKEST], [DARKEST, DARKEST]]
    assert drawn.columns == ["0-4", "5"]
    assert "most sensitive layer is a" in drawn.alt


def test_long_tables_are_drawn_in_evenly_spaced_rows():
    scale = torch.arange(1.0, 1001.0)
    drawn = range_map([ActivationRange("a", 8, scale), ActivationRange("b", 8, scale[:1])], scale)
    long, static = (_row(strip) for strip in drawn.colorings[0].strips)
    assert len(long) == len(static) == 200
    assert (long[0], long[-1]) == (BRIGHTEST, DARKEST)
    assert drawn.columns[3] == "498", "the middle of seven parts"
    assert selected_rows(3) == [2, 1, 0]
    assert selected_rows(1) == [0]
