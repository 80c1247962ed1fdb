from __future__ import annotations

from base64 import b64decode
from io import BytesIO

import pytest
import torch
from PIL import Image

from stepquant.report.figures import RANGE_COLORS, drawn_rows, line_chart, range_map, sensitivity_map
from stepquant.report.sensitivity import LayerSensitivity, SensitivityFile
from stepquant.report.structure import ActivationRange


def _points(chart) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (point.split(",") for point in chart.points.split())]


def _pixels(uri: str) -> Image.Image:
    return Image.open(BytesIO(b64decode(uri.removeprefix("data:image/png;base64,"))))


def test_a_line_runs_between_its_ticks():
    chart = line_chart([1, 2, 3], [0.0, 0.5, 1.0], "", "", "", percent=True)
    assert _points(chart) == [(0, chart.height), (chart.width / 2, chart.height / 2), (chart.width, 0)]
    ticks = [(tick.label, tick.position) for tick in chart.y_ticks]
    assert ticks == [("0 %", chart.height), ("50 %", chart.height / 2), ("100 %", 0)]


def test_time_may_run_backwards():
    chart = line_chart([900, 300, 0], [1.0, 1.0, 1.0], "", "", "", percent=False)
    assert [x for x, _ in _points(chart)] == pytest.approx([0, chart.width * 2 / 3, chart.width])
    assert [tick.label for tick in chart.x_ticks] == ["900", "300", "0"]


def test_more_than_a_decade_is_drawn_in_decades():
    chart = line_chart([1, 2, 3], [0.01, 0.1, 1.0], "", "", "", percent=True)
    assert [y for _, y in _points(chart)] == pytest.approx([chart.height, chart.height / 2, 0])
    assert [tick.label for tick in chart.y_ticks] == ["1 %", "2 %", "5 %", "10 %", "20 %", "50 %", "100 %"]


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [3.7], [1e-12, 1e12], [5.0, 5.0], [0.0, 1e-9]])
def test_odd_values_stay_inside(values):
    chart = line_chart(range(len(values)), values, "", "", "", percent=False)
    assert all(0 <= y <= chart.height for _, y in _points(chart))
    assert all(0 <= x <= chart.width for x, _ in _points(chart))
    assert all(-0.01 <= tick.position <= chart.height + 0.01 for tick in chart.y_ticks)


def test_a_map_has_a_pixel_for_each_layer_and_step_in_the_order_of_sampling():
    rising = torch.tensor([1.0, 10.0, 100.0]) / 255
    static = torch.tensor([10.0]) / 255
    drawn = range_map([ActivationRange("a", 8, rising), ActivationRange("b", 8, static)], torch.tensor([0.0, 5.0, 9.0]))
    image = _pixels(drawn.layers[0].cells)
    assert image.size == (3, 2)
    # The largest range is at the last timestep, where sampling begins: left.
    assert image.getpixel((0, 0)) == RANGE_COLORS[-1]
    assert image.getpixel((2, 0)) == RANGE_COLORS[0]
    assert {image.getpixel((column, 1)) for column in range(3)} == {image.getpixel((1, 0))}
    assert drawn.row_notes == ["1 to 100", "10"]
    assert [tick.label for tick in drawn.columns] == ["9", "5", "0"]
    assert [tick.label for tick in drawn.layers[0].ticks] == ["1", "10", "1e+02"]


def test_changes_are_relative_to_the_row():
    scales = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([100.0, 200.0, 300.0])]
    drawn = range_map([ActivationRange("a", 8, scale) for scale in scales], torch.arange(3.0))
    image = _pixels(drawn.layers[1].cells)
    assert [image.getpixel((column, 0)) for column in range(3)] == [image.getpixel((column, 1)) for column in range(3)]
    assert image.getpixel((1, 0)) == (240, 240, 240)


def test_static_tables_need_one_column():
    drawn = range_map([ActivationRange("a", 8, torch.ones(1))], torch.zeros(1))
    assert _pixels(drawn.layers[0].cells).size == (1, 1)
    assert len(drawn.layers) == 1
    assert drawn.columns == []


def test_a_map_of_errors_is_brightest_where_they_are_largest():
    layers = [
        LayerSensitivity(name="a", bits="w4a8", error=0.5, errors=[1.0, 1e-4]),
        LayerSensitivity(name="b", bits="w4a8", error=-0.1, errors=[-0.1, 1e-9]),
    ]
    drawn = sensitivity_map(SensitivityFile(how="relief", samples=4, step_groups=[(0, 4), (5, 5)], layers=layers))
    image = _pixels(drawn.layers[0].cells)
    assert image.getpixel((0, 0)) == RANGE_COLORS[-1]
    assert {image.getpixel(place) for place in ((1, 0), (0, 1), (1, 1))} == {RANGE_COLORS[0]}
    assert [tick.label for tick in drawn.columns] == ["0-4", "5"]
    assert "most sensitive layer is a" in drawn.alt


def test_of_a_long_table_evenly_spread_rows_are_drawn():
    scale = torch.arange(1.0, 1001.0)
    drawn = range_map([ActivationRange("a", 8, scale), ActivationRange("b", 8, scale[:1])], scale)
    image = _pixels(drawn.layers[0].cells)
    assert image.size == (200, 2)
    assert [image.getpixel((column, 0)) for column in (0, 199)] == [RANGE_COLORS[-1], RANGE_COLORS[0]]
    assert drawn.columns[0].label == "1000"
    assert drawn_rows(3) == [2, 1, 0]
    assert drawn_rows(1) == [0]
