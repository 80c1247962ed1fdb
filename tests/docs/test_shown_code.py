"""Commands and Python code in README.md and docs/ work: commands parse, names exist, arguments fit."""

import ast
import importlib
import inspect
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import typer

from benchmarks import pages
from stepquant.cli.main import app
from stepquant.recipes import QAT, RECIPES

ROOT = pages.ROOT
PAGES = pages.pages()
GROUP = typer.main.get_command(app)
SCRIPT_OPTIONS = {
    "--init",
    "--vae",
    "--export-only",
    "--learning-rate",
    "--steps",
    "--data",
    "--resident",
    "--roofline",
}
"""Options of the commands in training/, which training/README.md describes."""


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str, *languages: str) -> list[str]:
    return [code for language, code in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) if language in languages]


def command_lines(text: str) -> list[list[str]]:
    """The words after ``stepquant`` of every command in code blocks, fenced or indented."""
    indented = re.findall(r"^    (.*(?:\\\n.*)*)$", text, re.MULTILINE)
    lines = "\n".join([*blocks(text, "sh"), *indented]).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if re.match(r"(stepquant|torchrun|accelerate) ", line)]
    starts = [word.index("stepquant.cli.main") if "stepquant.cli.main" in word else 0 for word in words]
    return [word[start + 1 :] for word, start in zip(words, starts, strict=True)]


def makefile_commands() -> list[list[str]]:
    lines = (ROOT / "Makefile").read_text().replace("\\\n", " ").splitlines()
    commands = [part for line in lines for part in re.findall(r"\$\(BIN\)/stepquant ([^;]*)", line)]
    words = [shlex.split(re.sub(r"\$\$?[({]?\w+[)}]?|\$\$\(nproc\)", "2", command)) for command in commands]
    return [[word for word in command if word != "2)"] for command in words]


def spans(text: str) -> list[str]:
    """Code within the text, without code blocks and generated parts."""
    prose = re.sub(r"```.*?```|<!-- (?:table|code|options|recipe).*?<!-- end -->", "", text, flags=re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def check_arguments(words: list[str]) -> None:
    """Parse as the command does, with its types and required options, and run nothing."""
    assert words[0] in GROUP.commands, f"no such command: {words[0]}"
    values = GROUP.commands[words[0]].make_context(words[0], words[1:]).params
    recipe = (
        QAT if words[0] == "train" else RECIPES.get(values.get("recipe"))
    )  # None: a variable of the Makefile, or custom
    for assignment in values.get("set_") or []:
        assert recipe is None or assignment.partition("=")[0] in recipe.fields(), (
            f"no such hyperparameter: {assignment}"
        )


def options_of(command: str) -> set[str]:
    return {
        option
        for parameter in GROUP.commands[command].params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_code_blocks_parse(page):
    for words in command_lines(page.read_text()):
        check_arguments(words)


def test_commands_of_the_makefile_parse():
    commands = makefile_commands()
    assert len(commands) > 5
    for words in commands:
        check_arguments(words)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_options_in_the_text_exist(page):
    known = {"--help", *SCRIPT_OPTIONS}.union(*(options_of(command) for command in GROUP.commands))
    for span in spans(page.read_text()):
        words = span.split()
        if words[0] == "stepquant" and len(words) > 1:
            assert words[1] in GROUP.commands, f"no such command: {span}"
            given = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
            assert given <= options_of(words[1]), f"no such option: {span}"
        if words[0].startswith("--"):
            assert words[0].partition("=")[0] in known, f"no such option: {span}"
        if words[0] == "make" and len(words) > 1:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no such target: {span}"


class Names(ast.NodeVisitor):
    """Resolves what a block takes from stepquant, and checks the arguments of calls."""

    def __init__(self) -> None:
        self.known: dict[str, object] = {}

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            module = importlib.import_module(alias.name)
            self.known[alias.asname or alias.name.partition(".")[0]] = (
                module if alias.asname else importlib.import_module(alias.name.partition(".")[0])
            )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = importlib.import_module(node.module)
        for alias in node.names:
            self.known[alias.asname or alias.name] = getattr(module, alias.name)

    def resolve(self, node: ast.expr) -> object | None:
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute) and (owner := self.resolve(node.value)) is not None:
            return getattr(owner, node.attr)
        return None

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.resolve(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = self.resolve(node.func)
        if called is not None and str(getattr(called, "__module__", "")).startswith("stepquant"):
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            inspect.signature(called).bind(*node.args, **keywords)
            if inspect.isclass(called):  # a setting: its values are checked as it is made
                called(*map(ast.literal_eval, node.args), **{k: ast.literal_eval(v) for k, v in keywords.items()})
        self.generic_visit(node)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_blocks_use_what_exists(page):
    handwritten = re.sub(r"<!-- code: .*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
    for block in blocks(handwritten, "python"):
        Names().visit(ast.parse(textwrap.dedent(block)))
