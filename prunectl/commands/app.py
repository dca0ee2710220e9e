"""The table of commands, each imported only when it is run."""

from __future__ import annotations

import importlib
import os
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from prunectl import __version__

COMMANDS: dict[str, tuple[str, str]] = {
    "inspect": ("prunectl.commands.inspect", "What is in a model file: layers, sparsity, dead weight."),
    "prune": ("prunectl.commands.prune", "Zero the least important weights; all else stays byte for byte."),
    "finetune": ("prunectl.commands.finetune", "Train with the zeros kept, or prune on the way."),
    "strip": ("prunectl.commands.strip", "Drop masks, wrappers, optimizer state and training configuration."),
    "export": ("prunectl.commands.export", "Write another format, run beside its source before it is kept."),
    "sweep": ("prunectl.commands.sweep", "Try many ways to prune on your own data, and compare them."),
    "size": ("prunectl.commands.size", "Raw, packed and compressed size, and sparsity; with a limit it is a gate."),
    "check": ("prunectl.commands.check", "Hold models against their budgets; exit code 1 says that one is over."),
    "diff": ("prunectl.commands.diff", "What became of every tensor, also across formats."),
    "verify": ("prunectl.commands.verify", "Hold a pruned file against its manifest and its source."),
    "init": ("prunectl.commands.init", "Measure the models that are there, and write budgets a little above."),
    "doctor": ("prunectl.commands.doctor", "What is installed, what works, and what to install for the rest."),
    "plugins": ("prunectl.commands.plugins", "Strategies, schedules, policies and formats, also installed ones."),
    "help": ("prunectl.commands.help", "What exit codes, selectors, patterns, data and the like are."),
}

TOPICS: dict[str, tuple[str, str]] = {
    "exit-codes": ("exit_codes", "What the exit code of a command says."),
    "selectors": ("selectors", "Which tensors: --layer, --only, --exclude and --policy."),
    "sizes": ("sizes", "How sizes, ratios and limits are written, and what is measured."),
    "strategies": ("strategies", "Which weights go first, and what is looked at to tell."),
    "patterns": ("patterns", "In what shape weights go: any, 2:4, blocks, channels."),
    "schedules": ("schedules", "How sparsity rises while a model is trained."),
    "data": ("data", "How examples are named: train.npz, images/, table.csv?target=y."),
    "formats": ("formats", "Which files are read and written."),
    "recipes": ("recipes", "How a run is recorded, repeated to the byte, and verified."),
    "builds": ("builds", "make and CI: --depfile, --if-changed, check, reports."),
    "json": ("json", "What scripts read: --json, plain rows, CSV."),
    "trust": ("trust", "When code that comes with a file may run: --trust, --model."),
    "extending": ("extending", "Strategies, schedules and policies of your own."),
    "completion": ("completion", "How a shell completes commands, options and layer names."),
}
"""The topics of `prunectl help`, each with the function of its text."""

_COMPLETE = "_PRUNECTL_COMPLETE"
"""Set by the completion that a shell has installed."""
_COMPLETION_OPTIONS = ("--show-completion", "--install-completion")
_NO_SHELL_DETECTION = "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"
"""Lets typer take the shell that is named after these options; else it looks which one has started prunectl."""
HELP_NAMES = {"help_option_names": ["-h", "--help"]}


class LazyGroup(TyperGroup):
    """Knows the names and the help lines of its commands, and imports one when it is to run."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (_, line) in COMMANDS.items():
            self.add_command(TyperCommand(name, help=line))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Swap the placeholder of the command that was typed for the command itself."""
        name, placeholder, rest = super().resolve_command(ctx, args)
        if name not in COMMANDS:
            return name, placeholder, rest
        command = importlib.import_module(COMMANDS[name][0]).command
        if ctx.resilient_parsing:  # nobody runs anything: a shell asks for words
            importlib.import_module("prunectl.commands.completion").attach(command)
        return name, command, rest


def _version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"prunectl {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="prunectl",
    cls=LazyGroup,
    context_settings=HELP_NAMES,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(epilog="Exit codes: 0 done · 1 a gate said no · 2 usage · 3 input · 4 missing extra · 5 failed · 70 bug")
def prunectl(
    version: Annotated[
        bool, typer.Option("-V", "--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Make saved neural networks smaller, from the shell.

    [dim]$[/] prunectl inspect model.h5

    [dim]$[/] prunectl size model.pt --max-gzip 5MB
    """


def run(arguments: list[str]) -> int:
    """Run what was typed, and return its exit code."""
    if len(arguments) > 1 and arguments[0] in _COMPLETION_OPTIONS:
        os.environ[_NO_SHELL_DETECTION] = "1"
    command = typer.main.get_command(app)
    if os.environ.get(_COMPLETE):
        return int(importlib.import_module("prunectl.commands.completion").complete(command, _COMPLETE))
    # Not by command.main, which turns a closed pipe into exit code 1.
    try:
        with command.make_context("prunectl", arguments or ["--help"]) as context:
            return int(command.invoke(context) or 0)
    except typer.Exit as done:
        return done.exit_code
