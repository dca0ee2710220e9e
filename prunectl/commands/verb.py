"""What every command has: the options about output, and a reporter made of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from prunectl.commands.app import HELP_NAMES
from prunectl.commands.inputs import STDIN
from prunectl.commands.options import panel
from prunectl.errors import UsageError
from prunectl.formats.peek import address
from prunectl.reporting.reporter import Reporter
from prunectl.reporting.settings import DEFAULT_ROWS, Color, Layout, Settings
from prunectl.units import Units


class Verb(TyperCommand):
    """A command with the common options after its own, which it takes as a reporter in the context."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._common = lent(_settings)
        self.params.extend(self._common.params)

    def invoke(self, ctx: Any) -> Any:
        """Take the common options out, and work with a reporter made of them."""
        _check_addresses(self.params, ctx.params)
        chosen = {str(option.name): ctx.params.pop(option.name) for option in self._common.params}
        assert self._common.callback is not None
        html = Path(chosen["html"]) if chosen["html"] else None
        if html is not None:
            _check_page(html, ctx.params)
        ctx.obj = Reporter(self._common.callback(**chosen), command=str(self.name), html=html)
        return self.work(ctx)

    def work(self, ctx: Any) -> Any:
        """Do what the command is for, and return its exit code."""
        return super().invoke(ctx)


_WRITTEN = frozenset({"output", "html", "card", "manifest", "depfile", "logdir", "checkpoint_dir", "tried"})
"""Options that say where something is written."""


def _check_addresses(params: Iterable[Any], said: Mapping[str, Any]) -> None:
    """Refuse addresses, whatever the option: nothing is fetched. Those of models are left to who opens them."""
    for param in params:
        value = said.get(param.name)
        for word in value if isinstance(value, list | tuple) else (value,):
            if param.param_type_name == "option" and isinstance(word, str | Path):
                error = address(str(word), is_written=param.name in _WRITTEN)
                if error is not None:
                    raise error


def _check_page(html: Path, said: Mapping[str, Any]) -> None:
    """Refuse a page that nothing can be written to, or for which there would be no report."""
    if said.get("output") == STDIN or any(word.endswith(f":{STDIN}") for word in said.get("report") or ()):
        raise UsageError("--html writes the report, and standard output is taken by something else")
    importlib.import_module("prunectl.reporting.html.file").check(html)


def lent(function: Callable[..., Any]) -> Any:
    """Return a command that lends its options to others: typer makes them of a signature, as of any command's."""
    single = typer.Typer(add_completion=False)
    single.command()(function)
    return typer.main.get_command(single)


def verb(function: Callable[..., int], kind: type[Verb] = Verb) -> TyperCommand:
    """Make a command of a function that takes the context first and returns the exit code."""
    single = typer.Typer(context_settings=HELP_NAMES, rich_markup_mode="rich", add_completion=False)
    single.command(cls=kind)(function)
    command = typer.main.get_command(single)
    assert isinstance(command, TyperCommand)
    return command


_option = panel("Options of every command")


def _settings(
    *,
    json: Annotated[bool, _option("--json", help="One JSON object on stdout.")] = False,
    layout: Annotated[
        Layout | None, _option("--format", help="How to print; a terminal gets human, a pipe plain.")
    ] = None,
    html: Annotated[  # noqa: ARG001 - see Verb
        Path | None, _option("--html", metavar="FILE", help="Also write the report as a page for a browser.")
    ] = None,
    quiet: Annotated[bool, _option("-q", "--quiet", help="No notes.")] = False,
    verbose: Annotated[bool, _option("-v", "--verbose", help="Say how long it took, and how much memory.")] = False,
    debug: Annotated[bool, _option("--debug", help="Show tracebacks.")] = False,  # noqa: ARG001 - see failure.py
    color: Annotated[Color, _option("--color", help="When to colour.")] = Color.AUTO,
    no_progress: Annotated[bool, _option("--no-progress", help="No progress bars.")] = False,
    rows: Annotated[
        int, _option("-n", "--rows", help="Rows of the main table on a terminal; 0 is all.", min=0)
    ] = DEFAULT_ROWS,
    units: Annotated[Units, _option("--units", help="How to write bytes.")] = Units.SI,
) -> Settings:
    return Settings(
        layout=Layout.JSON if json else layout,
        is_quiet=quiet,
        is_verbose=verbose,
        color=color,
        has_progress=not no_progress,
        rows=rows,
        units=units,
    )
