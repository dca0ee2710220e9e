"""The table of commands, each imported only when it is run."""

from __future__ import annotations

import importlib
import os
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from prunectl import __version__

COMMANDS: dict[str, tuple[str, str]] = {
    "inspect": ("prunectl.commands.inspect", "Show what is in a model file: layers, sparsity, wasted bytes."),
    "prune": ("prunectl.commands.prune", "Set unimportant weights to zero, or remove whole channels."),
    "finetune": ("prunectl.commands.finetune", "Train with the zeros kept, or prune during training."),
    "strip": ("prunectl.commands.strip", "Remove masks, optimizer state and training configuration."),
    "export": ("prunectl.commands.export", "Convert to another format, and verify the result."),
    "sweep": ("prunectl.commands.sweep", "Prune in many ways, and compare size and accuracy."),
    "eval": ("prunectl.commands.eval", "Measure how good models are on data."),
    "bench": ("prunectl.commands.bench", "Measure how fast models are, and whether they differ."),
    "size": ("prunectl.commands.size", "Measure sizes and sparsity, and check them against limits."),
    "check": ("prunectl.commands.check", "Check models against their budgets, for CI."),
    "diff": ("prunectl.commands.diff", "Compare two models tensor by tensor, also across formats."),
    "verify": ("prunectl.commands.verify", "Verify a pruned model against its manifest and its source."),
    "init": ("prunectl.commands.init", "Write budgets for the models in a folder."),
    "doctor": ("prunectl.commands.doctor", "Show what is installed, what works, and what to install."),
    "plugins": ("prunectl.commands.plugins", "List strategies, schedules, policies and formats."),
    "help": ("prunectl.commands.help", "Explain exit codes, selectors, patterns, data and more."),
}

TOPICS: dict[str, tuple[str, str]] = {
    "exit-codes": ("exit_codes", "What each exit code means."),
    "selectors": ("selectors", "How to select tensors: --layer, --layers, --exclude, --policy."),
    "sizes": ("sizes", "How to write sizes and ratios, and what is measured."),
    "strategies": ("strategies", "How weights are ranked, and what data that takes."),
    "patterns": ("patterns", "Shapes of the zeros: unstructured, 2:4, blocks, channels."),
    "schedules": ("schedules", "How sparsity rises during training."),
    "data": ("data", "How to name data: train.npz, images/, table.csv?target=y."),
    "formats": ("formats", "Which formats can be read and written."),
    "recipes": ("recipes", "How to record, repeat and verify a run."),
    "builds": ("builds", "In make and CI: --depfile, --if-changed, check, reports."),
    "output": ("output", "Options of every command: --format, --rows, --quiet and others."),
    "json": ("json", "Output for scripts: --json, plain rows, CSV."),
    "trust": ("trust", "When code inside a file may run: --trust, --builder."),
    "extending": ("extending", "Your own strategies, schedules and policies."),
    "completion": ("completion", "Shell completion of commands, options and layer names."),
}
"""The topics of `prunectl help`, each with the function of its text."""

_COMPLETE = "_PRUNECTL_COMPLETE"
"""The environment variable that the completion script of a shell sets."""
_COMPLETION_OPTIONS = ("--show-completion", "--install-completion")
_NO_SHELL_DETECTION = "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"
"""The variable that makes typer take the shell that is named, instead of the one that started prunectl."""
COMMON_OPTIONS = "Common options"
HELP_NAMES = {"help_option_names": ["-h", "--help"]}


class LazyGroup(TyperGroup):
    """A group that has the names and help lines of its commands, and imports a command when it is run."""

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
        if ctx.resilient_parsing:  # a shell asks for completions, and no command runs
            importlib.import_module("prunectl.commands.completion").attach(command)
        return name, command, rest

    def get_help(self, ctx: Any) -> str:
        """The commands with one line each, without their options."""
        page = importlib.import_module("prunectl.commands._help_page")
        return str(page.group_help(ctx, ((name, line) for name, (_, line) in COMMANDS.items())))


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


@app.callback(
    epilog="Exit codes: 0 success · 1 limit exceeded · 2 usage · 3 input · 4 missing package · 5 failed · 70 bug"
)
def prunectl(
    version: Annotated[
        bool, typer.Option("-V", "--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Prune, measure and export saved neural networks from the shell.

    [dim]$[/] prunectl inspect model.h5

    [dim]$[/] prunectl prune model.h5 -o small.h5 -s 80% --scope global

    [dim]$[/] prunectl size small.h5 --max-gzip 5MB
    """


def run(arguments: list[str]) -> int:
    """Run the command line, and return its exit code."""
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
