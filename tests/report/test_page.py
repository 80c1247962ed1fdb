from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from stepquant.errors import StepquantError
from stepquant.report import render, write


class _Page(HTMLParser):
    """Tags with their attributes; checks that each one is closed where it should be."""

    EMPTY = frozenset({"meta", "link", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_page_is_self_contained(report):
    text = render(report)
    page = _Page(text)
    assert page.open == []
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"https?://|@import|url\(", text)


def test_every_figure_has_a_description(report):
    page = _Page(render(report))
    alternatives = [image["alt"] for image in page.named("img")]
    assert alternatives[:3] == [
        "Image 1: a cat, full precision",
        "Image 1: a cat, quantized",
        "Image 2: a dog, full precision",
    ]
    assert alternatives[5] == "Image 3, quantized"
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in page.named("svg"))
    assert "1.00% at the first, 20.00% at the last" in page.named("svg")[0]["aria-label"]


def test_the_page_contains_the_report(report):
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", render(report).partition("<body>")[2]))
    for expected in (
        "zoo:model quantized to w4a8 with quest . One activation scale per step",
        "30.0 dB",
        "0.9800",
        "0.25\u00d7 2.50 MB, in float32 10.0 MB",
        "2.00\u00d7 50.0 ms, full precision 100.0 ms",
        "a dog, 25.0 dB",
        "guidance default",
        "seed 5",
        "2 of 3 have per-step scales",
        "none: too few images",
        "duration not in the checkpoint",
        "torch: 2.0",
        "unet 0.90 kB",
        "while this layer alone is quantized. Measured on 4 samples",
        "third 1.25e+00 w4a8 float float first 2.50e-01 w4a8 4 8",
    ):
        assert expected.replace(" .", ".") in text.replace(" .", "."), expected


def test_nothing_of_a_checkpoint_becomes_markup(report, hostile_report):
    plain, attacked = _Page(render(report)), _Page(render(hostile_report))
    assert len(attacked.named("script")) == 1
    strips = 2 * 3 + 2 - (2 * 2 + 1)  # of the two heat maps
    assert len(attacked.named("img")) == len(plain.named("img")) - strips
    assert not any(name.startswith("on") for _, attributes in attacked.tags for name in attributes)
    assert hostile_report.name in attacked.named("img")[0]["alt"]


@pytest.mark.parametrize("provenance", [{}, {"recipe": None, "spec": "w4a8", "versions": [1, {"a": None}]}])
def test_provenance_of_any_shape_is_shown(report, provenance):
    assert "a model" in render(replace(report, provenance=provenance))


def test_a_model_of_weights_alone_has_no_map(report):
    text = render(replace(report, activations=[], sensitivity=None))
    assert 'class="heat"' not in text
    assert "Range of activations" not in text
    assert "Scale over time" in render(report)
    static = replace(report, activations=report.activations[2:])
    assert "Scale over time" not in render(static)
    assert "All are static" in render(static)


def test_the_same_report_gives_the_same_page(report):
    assert render(report) == render(report)


def test_a_page_that_cannot_be_written_leaves_nothing(report, tmp_path):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(StepquantError, match="cannot write"):
        write(report, tmp_path / "folder.html")
    write(report, tmp_path / "report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.html", "report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(report)
