"""Write the generated parts of README.md and docs/: result tables, code of the examples, options of commands.

``python -m benchmarks.pages`` rewrites what lies between the markers of every page.

A generated part starts with ``<!-- table: recipes w4a4 -->`` and ends with ``<!-- end -->``. ``table`` names a function
of `benchmarks.tables` and its argument, ``code`` a file and what it defines (``examples/best.py Best``), ``options`` a
command of ``stepquant``, ``recipe`` a recipe or ``train``.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from benchmarks import tables
from stepquant.cli.main import app
from stepquant.recipes import QAT, RECIPES

ROOT = Path(__file__).parents[1]
PART = re.compile(r"(<!-- (table|code|options|recipe): (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """Every page that is written by hand or half by hand."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "training" / "README.md"]


def code(path: str, *names: str) -> str:
    """Functions and classes of a file, as they stand there."""
    source = (ROOT / path).read_text()
    found = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    lines = source.splitlines()
    parts = []
    for name in names:
        node = found[name]
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        parts.append("\n".join(lines[first - 1 : node.end_lineno]))
    return "```python\n" + "\n\n\n".join(parts) + "\n```"


def options(command: str) -> str:
    """The options of a command, as ``--help`` lists them."""
    group: Any = typer.main.get_command(app)
    rows = []
    for parameter in group.commands[command].params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            names = [f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts)]
            rows.append([", ".join(names), meaning(parameter)])
    return tables.table(("option", "meaning"), rows)


def meaning(option: Any) -> str:
    text = (option.help or "").replace("|", "\\|")
    if option.default in (None, False) or "default" in text:
        return text + (" Required." if option.required else "")
    return f"{text} Default: `{option.default}`."


def recipe(name: str) -> str:
    """What a recipe does, both presets and what differs: from its docstrings and fields."""
    kind = QAT if name == "train" else RECIPES[name]
    text = (inspect.getdoc(inspect.getmodule(kind)) or "").partition("\n")[2].strip()
    presets = list(kind.PRESETS)
    rows = [
        [f"`{row.name}`", *(_differing(row, value) for value in row.values), " ".join(row.description.split())]
        for row in kind.compared()
    ]
    head = ("hyperparameter", *(f"`{preset}`" for preset in presets), "meaning")
    parts = [inspect.getdoc(kind) or "", text, tables.table(head, rows) if rows else ""]
    return "\n\n".join(part for part in parts if part)


def _differing(row: Any, value: str) -> str:
    return f"**`{value}`**" if row.differs else f"`{value}`"


def generated(kind: str, words: list[str]) -> str:
    if kind == "table":
        make: Callable[..., str] = getattr(tables, words[0])
        return make(*words[1:])
    return {"code": code, "options": options, "recipe": recipe}[kind](*words)


def up_to_date(text: str) -> str:
    """A page with its generated parts written anew."""
    return PART.sub(lambda part: f"{part[1]}{generated(part[2], part[3].split())}\n{part[4]}", text)


def main() -> None:
    stale = [page for page in pages() if up_to_date(page.read_text()) != page.read_text()]
    for page in stale:
        page.write_text(up_to_date(page.read_text()))
        print(f"updated {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
