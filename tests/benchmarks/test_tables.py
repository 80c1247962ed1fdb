"""Tables of results, from lines whose statistics are worked out by hand."""

import json

import pytest

from benchmarks import pages, tables


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Two seeds of two recipes; errors are geometric means of 1 and 4, 2 and 8, 2 and 2, 1 and 16."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    figures = {("minmax", 1): (20.0, [1, 4]), ("minmax", 2): (22.0, [2, 8]), ("pqd", 1): (23.0, [2, 2])}
    figures[("pqd", 2)] = (29.0, [1, 16])
    lines = []
    for (label, seed), (psnr, errors) in figures.items():
        for model in tables.MODELS:
            lines.append(
                {"model": model, "bits": "w4a4", "label": label, "seed": seed, "psnr_db": psnr}
                | {"step_error_percent": errors, "quantize_seconds": 10 * seed, "peak_memory_bytes": seed * 10**9}
                | {"class_agreement": 0.5, "class_agreement_fp32": 0.75, "frechet_classifier": 2.0}
                | {"frechet_classifier_fp32": 1.0}
            )
    (tmp_path / "papers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.usefixtures("results")
def test_recipes_have_mean_and_deviation():
    row = next(line for line in tables.recipes("w4a4").splitlines() if line.startswith("| `minmax`"))
    assert row.startswith("| `minmax` | 21.00 ± 1.41 | 3.00 ± 1.41 | 50.0 % |")


@pytest.mark.usefixtures("results")
def test_pairs_are_differences_within_seeds():
    """+3 and +7 dB; errors of 2 against 2 and 4 against 4."""
    row = next(line for line in tables.pairs("w4a4").splitlines() if line.startswith("| `pqd` over `minmax`"))
    assert row.split("|")[2].strip() == "+5.0 ± 2.8 dB, +0 ± 0 % (2)"


def test_a_single_value_says_so():
    assert tables.spread([1.25], 1) == "1.2 (1)" and tables.spread([]) == ""


@pytest.mark.parametrize("rows", [[["a", "1"]], []])
def test_generated_parts_replace_what_was_there(rows, monkeypatch):
    monkeypatch.setattr(tables, "example", lambda: tables.table(("x", "y"), rows), raising=False)
    page = "before\n<!-- table: example -->\nold\n<!-- end -->\nafter"
    expected = "before\n<!-- table: example -->\n| x | y |\n| --- | --- |\n" + ("| a | 1 |\n" if rows else "")
    assert pages.up_to_date(page) == expected + "<!-- end -->\nafter"
    assert pages.up_to_date(pages.up_to_date(page)) == pages.up_to_date(page)
