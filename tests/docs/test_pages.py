"""Pages are complete: links, images, files and headings exist, and generated parts are up to date."""

import ast
import re
from pathlib import Path

import pytest

from benchmarks import pages

PAGES = pages.pages()
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)
FOLDERS = ("benchmarks", "docs", "examples", "src", "tests", "training")


def name(page: Path) -> str:
    return str(page.relative_to(pages.ROOT))


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub turns them into anchors."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_images_resolve(page):
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), f"{target} does not exist"
            assert not anchor or anchor in anchors(linked), f"{target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_named_in_the_text_exist(page):
    for span in CODE.findall(page.read_text()):
        for word in re.split(r"[\s:`\"',()\[\]]+", span):
            if word.split("/")[0] in FOLDERS and "/" in word:
                assert list(pages.ROOT.glob(word.rstrip("/"))), f"{word} does not exist"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_generated_parts_are_up_to_date(page):
    text = page.read_text()
    assert pages.up_to_date(text) == text, "run python -m benchmarks.pages"


def test_every_image_is_shown():
    shown = {(page.parent / target).resolve() for page in PAGES for target in LINK.findall(page.read_text())}
    assert [path.name for path in (pages.ROOT / "docs" / "images").iterdir() if path.resolve() not in shown] == []


def test_every_page_is_reached_from_the_readme():
    reached, new = set(), {pages.ROOT / "README.md"}
    while new:
        reached |= new
        linked = {(page.parent / t.partition("#")[0]).resolve() for page in new for t in LINK.findall(page.read_text())}
        new = {page for page in linked if page.suffix == ".md" and page.is_file()} - reached
    assert [name(page) for page in PAGES if page not in reached] == []


def test_every_extension_point_shows_its_example():
    """The whole of what a page shows is code of the example, and parses by itself."""
    parts = re.findall(
        r"<!-- code: (\S+) .*? -->\n```python\n(.*?)```", (pages.ROOT / "docs/extend.md").read_text(), re.S
    )
    expected = ["best", "custom_quantizer", "custom_runtime"]
    assert [path for path, _ in parts] == [f"examples/{name}.py" for name in expected]
    for path, shown in parts:
        source = ast.parse((pages.ROOT / path).read_text())
        assert {ast.dump(node) for node in ast.parse(shown).body} <= {ast.dump(node) for node in source.body}
