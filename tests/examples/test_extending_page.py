"""What docs/extending.md shows is in the examples, line by line."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
SHOWN = re.findall(r"\(\.\./(examples/\w+\.py)\).*?```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_extension_point_has_an_example():
    assert [example for example, _ in SHOWN] == [
        "examples/best.py", "examples/own_quantizer.py", "examples/own_family.py", "examples/own_runtime.py"
    ]  # fmt: skip


@pytest.mark.parametrize(("example", "shown"), SHOWN, ids=[example for example, _ in SHOWN])
def test_lines_shown_are_those_of_the_example(example, shown):
    lines = {line.strip() for line in (ROOT / example).read_text().splitlines()}
    assert {line.strip() for line in shown.splitlines()} <= lines | {""}
