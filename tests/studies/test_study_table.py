from __future__ import annotations

import pytest

from stepquant.studies import Study, markdown_tables
from stepquant.studies.run import append_line

STUDY = Study.model_validate(
    {
        "models": ["fashion-class"],
        "bits": ["w4a8", "w4a4"],
        "seeds": [0, 1, 2],
        "recipes": {"minmax": {}, "short": {"recipe": "q-diffusion", "iterations": 5}},
        "pairs": [("short", "minmax")],
    }
)
FIGURES = {  # PSNR and errors of two steps, by bits, recipe and seed
    ("w4a8", "minmax", 0): (30.0, [1.0, 4.0]),
    ("w4a8", "short", 0): (31.0, [0.5, 2.0]),
    ("w4a8", "minmax", 1): (20.0, [2.0, 2.0]),
    ("w4a8", "short", 1): (24.0, [2.0, 0.5]),
    ("w4a8", "short", 2): (99.0, [9.0, 9.0]),  # without its baseline
    ("w4a4", "short", 0): (10.0, [9.0, 9.0]),
    ("w4a4", "minmax", 0): (12.0, [6.0, 6.0]),
}


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "lines.jsonl"
    for cell in STUDY.cells():
        if values := FIGURES.get((cell.bits, cell.label, cell.seed)):
            psnr, errors = values
            append_line(path, cell.model_dump(mode="json") | {"psnr_db": psnr, "step_error_percent": errors})
    return path


def test_pairs_are_compared_within_the_seeds_that_have_both(results):
    tables = markdown_tables(STUDY, results)
    # Gains of 1 and 4 dB; geometric means 1 of 2 and 1 of 2; deviations over two seeds.
    eight, four = tables[tables.index("**W4A8**") :].split("**W4A4**")
    assert "| `short` over `minmax` | +2.5 ± 2.1 dB, -50 ± 0 % (2) |" in eight
    assert "| `short` over `minmax` | -2.0 dB, +50 % (1) |" in four


def test_incomplete_pairs_have_no_table(results):
    assert "over" not in markdown_tables(STUDY.only(recipes=["short"]), results)
