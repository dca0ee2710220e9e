"""`prunectl help`: what does that mean?"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import typer
from typer.core import TyperCommand

from prunectl.commands.app import COMMANDS, HELP_NAMES
from prunectl.commands.help_man import man
from prunectl.commands.topics.table import TOPICS, aligned, lines_of
from prunectl.errors import UsageError
from prunectl.formats.names import nearest
from prunectl.reporting.streams import never_fail


def explain(
    topic: Annotated[str, typer.Argument(metavar="[TOPIC]", help="What about: a topic, or a command.")] = "",
    *,
    is_man: Annotated[bool, typer.Option("--man", help="Print the manual page, of all commands.")] = False,
) -> int:
    """Explain a topic or a command; alone, say what there is.

    [dim]$[/] prunectl help

    [dim]$[/] prunectl help exit-codes

    [dim]$[/] prunectl help prune

    [dim]$[/] prunectl help --man > prunectl.1
    """
    if is_man and topic:
        raise UsageError(f"--man is about all commands, not about {topic} alone", hint="prunectl help --man")
    if topic in COMMANDS:
        shown = importlib.import_module(COMMANDS[topic][0]).command
        with shown.make_context(f"prunectl {topic}", ["--help"]) as context:
            return int(shown.invoke(context) or 0)
    if topic and topic not in TOPICS:
        raise UsageError(
            f"there is no topic {topic!r}", did_you_mean=nearest(topic, [*TOPICS, *COMMANDS]), hint="prunectl help"
        )
    never_fail(sys.stdout)
    sys.stdout.write(man() if is_man else "".join(f"{line}\n" for line in (lines_of(topic) if topic else _all())))
    return 0


def _all() -> list[str]:
    topics = aligned((name, line) for name, (_, line) in TOPICS.items())
    commands = aligned((name, line) for name, (_, line) in COMMANDS.items())
    return ["prunectl help TOPIC", "", topics, "", "prunectl help COMMAND", "", commands]


def _command() -> TyperCommand:
    """Make the command; what it prints is for people, and takes none of the options about reports."""
    single = typer.Typer(context_settings=HELP_NAMES, rich_markup_mode="rich", add_completion=False)
    single.command("help")(explain)
    command = typer.main.get_command(single)
    assert isinstance(command, TyperCommand)
    return command


command = _command()
