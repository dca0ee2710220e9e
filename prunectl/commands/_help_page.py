"""The two pages of help of a command: `-h`, which fits on a screen, and `--help`, which has every option."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from prunectl.commands.app import COMMON_OPTIONS

_WIDEST = 100
"""The widest line, in characters: longer ones are hard to read."""
_NAMES_WIDTH = 28
_EXAMPLES = 3
_MARKUP = re.compile(r"\[/?(?:dim|bold|italic)?\]|\\(?=\[)")
SHORT = {
    "inspect": ("--layers", "--tensors", "--sort", "--pattern", "--flops", "--hist", "--groups", "--rows",
        "--sensitivity", "--data", "--builder", "--json", "--html"),
    "prune": ("--output", "--sparsity", "--scope", "--strategy", "--pattern", "--layers", "--exclude", "--max-drop",
        "--data", "--repair", "--builder", "--dry-run", "--force"),
    "finetune": ("--output", "--data", "--val", "--val-split", "--epochs", "--lr", "--sparsity", "--schedule",
        "--builder", "--device", "--checkpoint-dir", "--resume", "--force"),
    "strip": ("--output", "--only", "--half", "--pack", "--in-place", "--dry-run", "--force"),
    "export": ("--output", "--to", "--input", "--data", "--half", "--int8", "--pack", "--atol", "--rtol", "--builder",
        "--trust", "--force"),
    "sweep": ("--output", "--data", "--val", "--strategies", "--sparsities", "--scopes", "--patterns", "--max-drop",
        "--epochs", "--jobs", "--builder", "--html"),
    "eval": ("--data", "--metric", "--against", "--max-drop", "--min", "--max", "--builder", "--device", "--json"),
    "bench": ("--batch-size", "--threads", "--seconds", "--input", "--data", "--max-latency", "--min-speedup",
        "--builder", "--json"),
    "size": ("--max-raw", "--max-packed", "--max-gzip", "--min-sparsity", "--against", "--max-growth", "--codec",
        "--estimate", "--quiet", "--json"),
    "check": ("--config", "--report", "--baseline", "--update-baseline", "--reason", "--max-latency",
        "--trust", "--json"),
    "diff": ("--fail-on", "--rows", "--json", "--html", "--quiet"),
    "verify": ("--manifest", "--against", "--json", "--quiet"),
    "init": ("--margin", "--json"),
    "doctor": ("--json", "--quiet"),
    "plugins": ("--plot", "--force", "--json", "--quiet"),
    "help": ("--man",),
}  # fmt: skip
"""The options that `-h` shows, in this order."""


def show_help(ctx: typer.Context, *, is_short: bool) -> None:
    """Print a page of help."""
    typer.echo(help_text(ctx, is_short=is_short), color=False if os.environ.get("NO_COLOR") else None)


def help_text(ctx: typer.Context, *, is_short: bool) -> str:
    """A page of help as wide as the terminal, with its headings in bold."""
    return "\n".join(_help_lines(ctx, is_short=is_short))


def _help_lines(ctx: typer.Context, *, is_short: bool) -> Iterator[str]:
    """The lines of a page of help, as wide as the terminal."""
    width = min(get_terminal_size().columns, _WIDEST)
    command: Any = ctx.command
    arguments = [param for param in command.params if isinstance(param, TyperArgument)]
    options = [param for param in command.params if not isinstance(param, TyperArgument) and not param.hidden]
    usage = " ".join((ctx.command_path, *map(argument_name, arguments), "[OPTIONS]"))
    yield from _introduction(usage, command, width, is_short=is_short)
    if is_short:
        by_name = {name: option for option in options for name in option.opts}
        yield from _section("Options", [*arguments, *(by_name[name] for name in SHORT[str(command.name)])], width)
        yield from ("", f"All {len(options)} options: {ctx.command_path} --help")
        return
    yield from _section("Arguments", arguments, width)
    common = [option for option in options if option.rich_help_panel == COMMON_OPTIONS]
    for title, group in groupby(_by_panel([option for option in options if option not in common]), _panel):
        yield from _section(title, list(group), width)
    if common:
        yield from ("", _heading(f"{COMMON_OPTIONS} (prunectl help output)"))
        names = ", ".join(" ".join(sorted(spellings_of(option), key=len)) for option in common)
        yield from wrap(names, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def common_options(width: int) -> str:
    """The options of every command, each with its meaning."""
    params = importlib.import_module("prunectl.commands.inspect").command.params
    common = [param for param in params if getattr(param, "rich_help_panel", None) == COMMON_OPTIONS]
    return "\n".join(two_columns([(_names(option), _meaning(option)) for option in common], width))


def _introduction(usage: str, command: TyperCommand | TyperGroup, width: int, *, is_short: bool) -> Iterator[str]:
    """The usage of a command, its description, and examples."""
    paragraphs, examples = split_description(command)
    yield f"{_heading('Usage')} {usage}"
    for paragraph in paragraphs[: 1 if is_short else None]:
        yield ""
        yield from wrap(paragraph, width)
    yield ""
    yield _heading("Examples")
    yield from (f"  $ {example}" for example in examples[: _EXAMPLES if is_short else None])


def group_help(ctx: Any, commands: Iterable[tuple[str, str]]) -> str:
    """The help of prunectl itself: its commands, each with one line."""
    width = min(get_terminal_size().columns, _WIDEST)
    options = [*ctx.command.params, ctx.command.get_help_option(ctx)]
    lines = [
        *_introduction(f"{ctx.command_path} COMMAND [OPTIONS]", ctx.command, width, is_short=True),
        *("", _heading("Commands"), *two_columns(commands, width)),
        *_section("Options", options, width),
        *("", *wrap(ctx.command.epilog, width)),
    ]
    return "\n".join(lines)


def _section(title: str, params: Sequence[Any], width: int) -> Iterator[str]:
    if params:
        yield from ("", _heading(title))
        yield from two_columns([(_names(param), _meaning(param)) for param in params], width)


def two_columns(rows: Iterable[tuple[str, str]], width: int) -> Iterator[str]:
    """Names and their meanings in two columns; a name that is too long has a line of its own."""
    known = list(rows)
    column = min(max(len(names) for names, _ in known), _NAMES_WIDTH) + 4
    for names, meaning in known:
        lines = wrap(meaning, width - column, break_on_hyphens=False) or [""]
        if len(names) + 4 > column:
            yield f"  {names}"
        else:
            yield f"  {names}".ljust(column) + lines.pop(0)
        yield from (" " * column + line for line in lines)


def _heading(title: str) -> str:
    return typer.style(f"{title}:", bold=True)


def _panel(option: Any) -> str:
    return option.rich_help_panel or "Options"


def argument_name(param: TyperArgument) -> str:
    """The placeholder of an argument; in brackets if it is optional."""
    name = param.metavar or str(param.name).upper()
    many = f"{name}..." if param.nargs == -1 and "..." not in name else name
    return many if param.required or many.startswith("[") else f"[{many}]"


def _by_panel(options: Sequence[Any]) -> list[Any]:
    """Options in the order in which their panels first appear."""
    panels = list(dict.fromkeys(map(_panel, options)))
    return sorted(options, key=lambda option: panels.index(_panel(option)))


def _names(param: Any) -> str:
    if isinstance(param, TyperArgument):
        return argument_name(param)
    spellings = ", ".join(sorted(spellings_of(param), key=len))
    if param.is_flag:
        return spellings if spellings.startswith("-") and not spellings.startswith("--") else f"    {spellings}"
    return f"{spellings if len(param.opts) > 1 else f'    {spellings}'} {value_name(param)}"


def _meaning(param: Any) -> str:
    text = plain_text(param.help)
    return text if "[default:" in text else text + default_text(param)


def plain_text(text: str | None) -> str:
    """A help text without markup and line breaks."""
    return " ".join(_MARKUP.sub("", text or "").split())


def spellings_of(option: Any) -> Iterable[str]:
    """The spellings of an option, with both forms of a switch, as --zeros and --no-zeros."""
    return (*option.opts, *option.secondary_opts)


def value_name(option: Any) -> str:
    """The placeholder of an option's value, or its choices."""
    if option.metavar:
        return str(option.metavar)
    known = getattr(option.type, "choices", None)
    if known:
        return "|".join(map(str, known))
    kind = str(option.type.name).upper().removesuffix(" RANGE")
    return {"INT": "N", "INTEGER": "N", "FLOAT": "X"}.get(kind, kind)


def default_text(option: Any) -> str:
    """The default of an option in brackets, where it is worth showing."""
    is_shown = isinstance(option, TyperOption) and not option.is_flag and option.default not in (None, "", [], ())
    return f" [default: {option.default}]" if is_shown else ""


def split_description(command: TyperCommand | TyperGroup) -> tuple[list[str], list[str]]:
    """The paragraphs of a command's description, and its examples."""
    parts = _MARKUP.sub("", command.help or "").split("\n\n")
    examples = [part.removeprefix("$ ") for part in parts if part.startswith("$ ")]
    return [part for part in parts if not part.startswith("$ ")], examples
