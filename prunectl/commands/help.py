"""`prunectl help`: what does that mean?"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand

from prunectl import __version__
from prunectl.commands import _topics
from prunectl.commands._topics import MEANINGS, aligned
from prunectl.commands.app import COMMANDS, HELP_NAMES, TOPICS
from prunectl.errors import UsageError
from prunectl.formats.base import close_matches
from prunectl.reporting.reporter import escape_unencodable

_MARKUP = re.compile(r"\[/?(?:dim|bold|italic)?\]|\\(?=\[)")
_COMMON = "Options of every command"
_HELP = (".TP", "\\fB\\-h\\fR, \\fB\\-\\-help\\fR", "Show what a command takes.")
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
        roff("prunectl - make saved neural networks smaller, from the shell"),
        ".SH SYNOPSIS",
        ".B prunectl",
        ".I COMMAND",
        roff("[OPTIONS] [ARGUMENTS]"),
        ".SH DESCRIPTION",
        roff(
            "Inspects, prunes, fine-tunes, strips, exports and sizes files of neural networks: Keras, TensorFlow, "
            "PyTorch, ONNX, safetensors and TensorFlow Lite. An output is there whole or not at all."
        ),
        ".SH COMMANDS",
    ]
    for name, command in commands.items():
        lines += _man_command(name, command)
    lines += [".SH OPTIONS OF EVERY COMMAND", *_HELP, *_options(commands["inspect"], is_common=True)]
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
    paragraphs, examples = _split(command)
    arguments = " ".join(_argument(param) for param in command.params if isinstance(param, TyperArgument))
    yield from (".PP", f"\\fBprunectl {roff(name)}\\fR [\\fIOPTIONS\\fR] {roff(arguments)}".rstrip())
    for paragraph in paragraphs:
        yield from (".PP", roff(paragraph))
    yield from _options(command, is_common=False)
    if examples:
        yield from (".PP", "Examples:", ".PP", ".nf", ".RS", *map(roff, examples), ".RE", ".fi")


def _argument(param: TyperArgument) -> str:
    name = param.metavar or str(param.name).upper()
    many = f"{name}..." if param.nargs == -1 and "..." not in name else name
    return many if param.required or many.startswith("[") else f"[{many}]"


def _split(command: TyperCommand) -> tuple[list[str], list[str]]:
    """The paragraphs of a command's description, and its examples."""
    parts = _MARKUP.sub("", command.help or "").split("\n\n")
    examples = [part.removeprefix("$ ") for part in parts if part.startswith("$ ")]
    return [part for part in parts if not part.startswith("$ ")], examples


def _options(command: TyperCommand, *, is_common: bool) -> Iterator[str]:
    for param in command.params:
        option: Any = param
        if isinstance(param, TyperArgument) or (getattr(option, "rich_help_panel", None) == _COMMON) != is_common:
            continue
        names = ", ".join(f"\\fB{roff(name)}\\fR" for name in _spellings(option))
        value = "" if option.is_flag else f" \\fI{roff(_value(option))}\\fR"
        text = " ".join(_MARKUP.sub("", option.help or "").split())
        yield from (".TP", f"{names}{value}", roff(f"{text}{_default(option)}"))


def _spellings(option: Any) -> Iterable[str]:
    # Both ways of a switch, as in --zeros and --no-zeros.
    return (*option.opts, *option.secondary_opts)


def _value(option: Any) -> str:
    if option.metavar:
        return str(option.metavar)
    known = getattr(option.type, "choices", None)
    return "|".join(map(str, known)) if known else str(option.type.name).upper().removesuffix(" RANGE")


def _default(option: Any) -> str:
    is_shown = not option.is_flag and option.default not in (None, "", [], ())
    return f" [default: {option.default}]" if is_shown else ""


def _trimmed(text: list[str]) -> list[str]:
    return text[1:] if text and not text[0] else text


def show_topic(
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
        command = importlib.import_module(COMMANDS[topic][0]).command
        with command.make_context(f"prunectl {topic}", ["--help"]) as context:
            return int(command.invoke(context) or 0)
    if topic and topic not in TOPICS:
        raise UsageError(
            f"there is no topic {topic!r}",
            did_you_mean=close_matches(topic, [*TOPICS, *COMMANDS]),
            hint="prunectl help",
        )
    escape_unencodable(sys.stdout)
    sys.stdout.write(
        man() if is_man else "".join(f"{line}\n" for line in (topic_lines(topic) if topic else _list_topics()))
    )
    return 0


def _list_topics() -> list[str]:
    topics = aligned((name, line) for name, (_, line) in TOPICS.items())
    commands = aligned((name, line) for name, (_, line) in COMMANDS.items())
    return ["prunectl help TOPIC", "", topics, "", "prunectl help COMMAND", "", commands]


def _command() -> TyperCommand:
    """Make the command; what it prints is for people, and takes none of the options about reports."""
    single = typer.Typer(context_settings=HELP_NAMES, rich_markup_mode="rich", add_completion=False)
    single.command("help")(show_topic)
    command = typer.main.get_command(single)
    assert isinstance(command, TyperCommand)
    return command


command = _command()
