from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from stepquant.config import QuantSpec
from stepquant.errors import StepquantError
from stepquant.studies import Study, read_study

STUDY = {
    "models": ["fashion-class", "emoji-ldm"],
    "bits": ["w8a8", "w4a4"],
    "seeds": [0, 1],
    "guidance": {"fashion-class": 4.0},
    "recipes": {"minmax": {}, "short": {"recipe": "q-diffusion", "iterations": 5}},
}


def test_cells_come_seed_by_seed_then_bits_models_recipes():
    cells = list(Study.model_validate(STUDY).cells())
    order = [(cell.seed, cell.bits, cell.model, cell.label) for cell in cells]
    assert order == list(itertools.product([0, 1], ["w8a8", "w4a4"], STUDY["models"], ["minmax", "short"]))
    assert cells[1].recipe == "q-diffusion"
    assert cells[1].arguments["iterations"] == 5
    assert "rounding" in cells[1].arguments, "defaults are part of a cell"
    assert [cell.guidance for cell in cells[:4:2]] == [4.0, None]
    assert cells[0].source == "zoo:fashion-class"


def test_identity_is_what_determines_the_result():
    def identities(**changes):
        return [cell.identity for cell in Study.model_validate(STUDY | changes).cells()]

    base = identities()
    assert len(set(base)) == len(base)
    renamed = {"other name": {"recipe": "minmax"}, "short": STUDY["recipes"]["short"]}
    assert identities(recipes=renamed) == base
    for change in (
        {"evaluation": {"count": 8}},
        {"evaluation": {"frechet_count": 99}},
        {"calibration": {"samples": 8}},
        {"guidance": {"fashion-class": 3.0, "emoji-ldm": 1.0}},
        {"seeds": [2, 3]},
        {"bits": ["w8a4", "w6a6"]},
    ):
        assert not set(identities(**change)) & set(base), change


def test_an_entry_can_change_the_calibration():
    study = Study.model_validate(STUDY | {"recipes": {"few": {"recipe": "minmax", "calibration": {"samples": 7}}}})
    cell = next(study.cells())
    assert cell.calibration.samples == 7
    assert cell.calibration.steps == study.calibration.steps != 7
    assert "calibration" not in cell.arguments


def test_an_entry_can_do_a_share_of_a_preset():
    entry = {"recipe": "eda-dm", "preset": "paper", "share": 0.04, "layer_weight": 0.5}
    cell = next(Study.model_validate(STUDY | {"recipes": {"part": entry}}).cells())
    assert (cell.arguments["iterations"], cell.arguments["layer_weight"]) == (200, 0.5)
    assert cell.arguments["rounding"] == "adaround" and "share" not in cell.arguments
    for share in (0, 1.5, "all", True):
        with pytest.raises(StepquantError, match="share is"):
            next(Study.model_validate(STUDY | {"recipes": {"part": entry | {"share": share}}}).cells())


@pytest.mark.parametrize("name", ["published", "public_code"])
def test_studies_of_this_repository_are_valid(name):
    study = read_study(Path(__file__).parents[2] / "benchmarks" / "studies" / f"{name}.toml")
    cells = list(study.cells())
    assert len({cell.identity for cell in cells}) == len(cells)


def test_an_entry_can_have_options():
    plain, *others = (
        next(Study.model_validate(STUDY | {"recipes": {"minmax": {"options": options}}}).cells())
        for options in ({}, {"correction": True}, {"budget": 5.0}, {"spec": {"smoothing": True}})
    )
    assert plain.identity == next(Study.model_validate(STUDY).cells()).identity
    assert len({cell.identity for cell in (plain, *others)}) == 4
    assert others[2].spec == QuantSpec(bits="w8a8", smoothing=True)
    assert not any(cell.arguments for cell in (plain, *others))


def test_seeds_share_no_noise():
    cells = list(Study.model_validate(STUDY | {"evaluation": {"count": 10_000}}).cells())
    starts = sorted({cell.noise for cell in cells})
    assert starts[1] - starts[0] >= cells[0].evaluation.images


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"models": ["nope"]}, "no model 'nope'"),
        ({"bits": ["w2a2"]}, "no bits 'w2a2'"),
        ({"seeds": [9]}, "no seed 9"),
        ({"recipes": ["magic"]}, "no recipe 'magic'"),
    ],
)
def test_selection(selection, message):
    study = Study.model_validate(STUDY)
    assert [cell.label for cell in study.only(recipes=["short"], seeds=[1], bits=["w4a4"]).cells()] == ["short"] * 2
    with pytest.raises(StepquantError, match=message):
        study.only(**selection)


def test_a_selection_keeps_complete_pairs():
    study = Study.model_validate(STUDY | {"pairs": [("short", "minmax")]})
    assert study.only(seeds=[0]).pairs == study.pairs
    assert study.only(recipes=["short"]).pairs == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipes": {"magic": {}}}, "unknown recipe 'magic'"),
        ({"recipes": {"minmax": {"iterations": 5}}}, "no hyperparameter 'iterations'"),
        ({"recipes": {"own": {"recipe": "nowhere.py:f"}}}, "no recipe file 'nowhere.py'"),
        ({"recipes": {"few": {"recipe": "minmax", "calibration": {"samples": 0}}}}, "recipe 'few'.*samples"),
        ({"recipes": {"few": {"recipe": "minmax", "options": {"corect": True}}}}, "recipe 'few'.*corect"),
        ({"recipes": {"few": {"recipe": "minmax", "options": {"spec": {"balans": True}}}}}, "balans"),
        ({"recipes": {"minmax": {"calibration": 3}}}, "recipe 'minmax'.*calibration is 3; expected a table"),
        ({"recipes": {"minmax": {"options": 3}}}, "recipe 'minmax'.*options is 3; expected a table"),
        ({"recipes": {"own": {"recipe": 3}}}, "recipe 'own'.*recipe is 3; expected its name"),
        ({"models": ["nope"]}, "no model 'nope'"),
        ({"bits": ["w9a9"]}, "bits"),
    ],
)
def test_unknown_names_are_rejected_before_the_work(change, message):
    with pytest.raises(StepquantError, match=message):
        list(Study.model_validate(STUDY | change).cells())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models = [", "cannot be read"),
        ("bits = []", "models: Field required"),
        ('models = ["a"]\nbits = ["w8a8"]\nseeds = [-1]\n[recipes]\nminmax = {}', "seeds.0"),
        ('models = ["a"]\nbits = ["w8a8"]\nseeds = [0]\ncount = 3\n[recipes]\nminmax = {}', "count: Extra"),
        (
            'models = ["a"]\nbits = ["w8a8"]\nseeds = [0]\npairs = [["minmax", "magic"]]\n[recipes]\nminmax = {}',
            "pairs: 'magic' is not among the recipes",
        ),
    ],
)
def test_an_invalid_file_is_reported_in_one_sentence(text, message, tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(text)
    with pytest.raises(StepquantError, match=message):
        read_study(path)


def test_the_studies_of_this_repository_are_valid():
    paths = sorted((Path(__file__).parents[2] / "benchmarks" / "studies").glob("*.toml"))
    assert paths
    for path in paths:
        assert list(read_study(path).cells())
