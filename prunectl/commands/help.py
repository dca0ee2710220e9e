"""`prunectl help`: what does that mean?"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand

from prunectl import __version__
from prunectl.commands import _topics
from prunectl.commands._command import add_help_options, make_command
from prunectl.commands._help_page import (
    argument_name,
    default_text,
    plain_text,
    spellings_of,
    split_description,
    value_name,
)
from prunectl.commands._topics import MEANINGS, aligned
from prunectl.commands.app import COMMANDS, COMMON_OPTIONS, TOPICS
from prunectl.errors import UsageError
from prunectl.formats.base import close_matches
from prunectl.reporting.reporter import escape_unencodable
from prunectl.reporting.stdout import data_stream

_HELP = (".TP", "\\fB\\-h\\fR, \\fB\\-\\-help\\fR", "Show the help of a command.")
_ESCAPED = {"\\": "\\e", "-": "\\-", "…": "...", "“": '"', "”": '"'}


def topic_lines(topic: str) -> tuple[str, ...]:
    """The text of a topic, line by line."""
    text: str = getattr(_topics, f"{TOPICS[topic][0]}_text")()
    return tuple(text.strip().splitlines())


def man() -> str:
    """The manual page, in roff."""
    commands = {name: importlib.import_module(module).command for name, (module, _) in COMMANDS.items()}
    lines = [
        f'.TH PRUNECTL 1 "" "prunectl {__version__}" "User Commands"',
        ".SH NAME",
        roff("prunectl - prune, measure and export saved neural networks"),
        ".SH SYNOPSIS",
        ".B prunectl",
        ".I COMMAND",
        roff("[OPTIONS] [ARGUMENTS]"),
        ".SH DESCRIPTION",
        roff(
            "Inspects, prunes, fine-tunes, strips, exports and measures saved neural networks: Keras, TensorFlow, "
            "PyTorch, ONNX, safetensors and TensorFlow Lite. Outputs are written whole or not at all."
        ),
        ".SH COMMANDS",
    ]
    for name, command in commands.items():
        lines += _man_command(name, command)
    lines += [".SH COMMON OPTIONS", *_HELP, *_options(commands["inspect"], is_common=True)]
    lines += [
        ".SH EXIT STATUS",
        *(line for code, meaning in MEANINGS.items() for line in (".TP", str(code), roff(meaning))),
    ]
    for topic in TOPICS:
        title, *text = topic_lines(topic)
        if topic != "exit-codes":
            lines += [f".SH {roff(title.upper())}", ".nf", *map(roff, _trimmed(text)), ".fi"]
    return "\n".join(lines) + "\n"


def roff(text: str) -> str:
    """Escape a text for roff."""
    escaped = "".join(_ESCAPED.get(letter, letter) for letter in text)
    ascii_only = "".join(letter if letter.isascii() else f"\\[u{ord(letter):04X}]" for letter in escaped)
    return f"\\&{ascii_only}" if ascii_only.startswith((".", "'")) else ascii_only


def _man_command(name: str, command: TyperCommand) -> Iterator[str]:
    yield f".SS prunectl {roff(name)}"
    paragraphs, examples = split_description(command)
    arguments = " ".join(argument_name(param) for param in command.params if isinstance(param, TyperArgument))
    yield from (".PP", f"\\fBprunectl {roff(name)}\\fR [\\fIOPTIONS\\fR] {roff(arguments)}".rstrip())
    for paragraph in paragraphs:
        yield from (".PP", roff(paragraph))
    yield from _options(command, is_common=False)
    if examples:
        yield from (".PP", "Examples:", ".PP", ".nf", ".RS", *map(roff, examples), ".RE", ".fi")


def _options(command: TyperCommand, *, is_common: bool) -> Iterator[str]:
    for param in command.params:
        option: Any = param
        if isinstance(param, TyperArgument) or (option.rich_help_panel == COMMON_OPTIONS) != is_common:
            continue
        names = ", ".join(f"\\fB{roff(name)}\\fR" for name in spellings_of(option))
        value = "" if option.is_flag else f" \\fI{roff(value_name(option))}\\fR"
        text = plain_text(option.help)
        yield from (".TP", f"{names}{value}", roff(f"{text}{default_text(option)}"))


def _trimmed(text: list[str]) -> list[str]:
    return text[1:] if text and not text[0] else text


def show_topic(
    topic: Annotated[str, typer.Argument(metavar="[TOPIC]", help="Topic or command to explain.")] = "",
    *,
    is_man: Annotated[bool, typer.Option("--man", help="Print the manual page of all commands.")] = False,
) -> int:
    """Explain a topic or a command; without one, list them.

    [dim]$[/] prunectl help

    [dim]$[/] prunectl help exit-codes

    [dim]$[/] prunectl help prune

    [dim]$[/] prunectl help --man > prunectl.1
    """
    if is_man and topic:
        raise UsageError(
            f"--man prints the page of all commands and cannot be used with {topic}", hint="write prunectl help --man"
        )
    if topic in COMMANDS:
        command = importlib.import_module(COMMANDS[topic][0]).command
        with command.make_context(f"prunectl {topic}", ["--help"]) as context:
            return int(command.invoke(context) or 0)
    if topic and topic not in TOPICS:
        raise UsageError(
            f"there is no topic {topic!r}",
            did_you_mean=close_matches(topic, [*TOPICS, *COMMANDS]),
            hint="list the topics: prunectl help",
        )
    escape_unencodable(data_stream())
    data_stream().write(
        man() if is_man else "".join(f"{line}\n" for line in (topic_lines(topic) if topic else _list_topics()))
    )
    return 0


def _list_topics() -> list[str]:
    topics = aligned((name, line) for name, (_, line) in TOPICS.items())
    commands = aligned((name, line) for name, (_, line) in COMMANDS.items())
    return ["prunectl help TOPIC", "", topics, "", "prunectl help COMMAND", "", commands]


# Its output is text for people, so the options about reports do not apply.
command = make_command(show_topic, TyperCommand)
command.name = "help"
add_help_options(command)
