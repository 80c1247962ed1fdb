import pytest

from benchmarks import published
from stepquant.studies import read_study


def line(label, seed, error, seconds=10.0, psnr=30.0):
    return {
        "model": "fashion-ddpm", "bits": "w4a8", "label": label, "seed": seed, "step_error_percent": [error, error],
        "quantize_seconds": seconds, "psnr_db": psnr,
    }  # fmt: skip


def test_a_claim_compares_errors_within_seeds():
    claim = next(claim for claim in published.CLAIMS if claim.text == "CMA adds to TLA")
    lines = [
        line(claim.better, 0, 1.0),
        line(claim.worse, 0, 2.0),
        line(claim.better, 1, 3.0),
        line(claim.worse, 1, 4.0),
    ]
    lines.append(line(claim.better, 2, 9.0))  # without a partner
    assert published.compared(lines, claim, "fashion-ddpm", "w4a8") == pytest.approx(-37.5)
    assert published.compared(lines, claim, "fashion-ddpm", "w4a4") is None
    row = next(row for row in published.claims(lines).splitlines() if "CMA adds" in row)
    assert ("-37 %" in row or "-38 %" in row) and "W4A8 1 of 1" in row


def test_points_are_the_budgets_of_one_recipe_and_preset():
    budgets = {"1": 90.0, "1/5": 20.0}
    lines = [
        line(f"tdq, paper {budget}", seed, 1.0, seconds, 30.0 + seed)
        for budget, seconds in budgets.items()
        for seed in (0, 1)
    ]
    lines += [line("tdq, paper 1, static", 0, 1.0), line("tdq, fast 1", 0, 1.0)]
    found = published.points_of(lines, "fashion-ddpm", "w4a8", "tdq, paper ")
    assert found == [(20.0, 30.5), (90.0, 30.5)]


def test_claims_and_recipes_are_in_the_study():
    study = read_study(published.ROOT / "benchmarks" / "studies" / "published.toml")
    labels = {label for claim in published.CLAIMS for label in (claim.better, claim.worse)}
    labels |= {f"{name}, {preset} 1/25" for name in published.RECIPES for preset in ("paper", "fast")}
    assert labels <= set(study.recipes)
