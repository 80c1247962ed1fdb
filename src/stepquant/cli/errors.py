"""One-line errors: the library names Python parameters, the command line its options."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from stepquant.cli.output import only_main_prints
from stepquant.distributed import joined
from stepquant.errors import LowQualityWarning, StepquantError

USAGE_ERROR = 2
INTERRUPTED = 130
UsageError: Any = typer.BadParameter.__bases__[0]
"""Typer's own, or click's in versions of typer that build on it."""
LIBRARY_NAMES = {"correct": "correction", "metric": "metrics"}
"""Options that the library has under another name."""


class Command(TyperCommand):
    """A command that reports a user's error in one line on standard error, without a traceback."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with self._one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with self._one_line_errors(), joined() as ranks, only_main_prints(ranks), self._one_line_warnings():
            return super().invoke(ctx)

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except StepquantError as error:
            _fail(name_options(str(error), self.params), USAGE_ERROR)
        except UsageError as error:
            _fail(f"{error.format_message().rstrip('.')}. See: stepquant {self.name} --help", USAGE_ERROR)
        except KeyboardInterrupt:
            _fail("interrupted; finished stages are kept. Run the same command again to continue.", INTERRUPTED)

    @contextmanager
    def _one_line_warnings(self) -> Iterator[None]:
        """Print a `LowQualityWarning` like an error; others as they would be."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", LowQualityWarning)
            usual = warnings.showwarning

            def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
                if issubclass(category, LowQualityWarning):
                    typer.echo(f"stepquant: {name_options(str(message), self.params)}", err=True)
                else:
                    usual(message, category, *where, **more)

            warnings.showwarning = show
            yield


class Commands(TyperGroup):
    """The commands of ``stepquant``; an unknown command or option is reported in one line as well."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> Any:
        try:
            return super().make_context(info_name, args, *rest, **extra)
        except UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                raise
            _fail(f"{error.format_message().rstrip('.')}. See: stepquant --help", USAGE_ERROR)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands:
            _fail(f"there is no command {args[0]!r}; expected one of {', '.join(self.commands)}.", USAGE_ERROR)
        return super().resolve_command(ctx, args)


def name_options(message: str, parameters: list[Any]) -> str:
    """Replace the names of Python parameters in a message by options.

    A parameter is recognized in backticks (```steps```), with a value (``overwrite=True``) and at the beginning of the
    message (``steps is 0``).

    Args:
        parameters: the command's, as click describes them.
    """
    for parameter in parameters:
        if parameter.param_type_name == "option":
            name, flag = LIBRARY_NAMES.get(parameter.name, parameter.name), parameter.opts[0]
            values = {"True": flag, "False": (*parameter.secondary_opts, flag)[0]}
            for given, value in re.findall(rf'(`?\b{name}="?([\w-]+|\.\.\.)"?`?)', message):
                message = message.replace(given, values.get(value, f"{flag} {value}"))
            message = re.sub(rf"`{name}`|^{name}(?= (?:is|are) )", flag, message)
    return message


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"stepquant: {' '.join(message.split())}", err=True)
    raise typer.Exit(code) from None
