"""Shell completion of options: names in the model on the command line, and names that prunectl knows.

Imported only where a shell asks, which is while somebody waits for a key: no weight is read, and nothing is said.

What bash asks and is answered: it breaks words at = and :, and puts words back together by what comes after.

`--layer=fc1/kernel:0` arrives as `--layer = fc1/kernel : 0`, of which only the 0 is what it completes.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from typer.core import TyperArgument, TyperCommand

from prunectl.analysis.patterns import CHANNEL, LAYERS
from prunectl.checks.diff import DiffRule
from prunectl.commands.app import COMMANDS, TOPICS
from prunectl.errors import PrunectlError, UsageError, attempt
from prunectl.exporting.routes import TARGETS
from prunectl.formats.base import StripPart
from prunectl.formats.registry import open_model
from prunectl.pruning.choices import choices
from prunectl.pruning.plan import Scope
from prunectl.reporting.ci import REPORT_FORMATS as REPORTS
from prunectl.training.config import LR_SCHEDULES


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion, with the attributes that Typer expects."""

    value: str
    help: str = ""
    type: str = "plain"


Offers = Callable[[Iterable[str]], Iterable[Completion]]
"""The possible completions, given the arguments that were typed."""

PATTERNS = {
    "unstructured": "zeros anywhere",
    "2:4": "2 zeros in every 4 weights: 50 % sparse",
    "1:4": "1 zero in every 4 weights: 25 % sparse",
    "block:1x4": "blocks of 1 input x 4 outputs",
    "block:4x4": "blocks of 4 inputs x 4 outputs",
    "block:4x4:max": "the same, ranked by the largest weight",
    "channel": "whole channels, removed from the network",
    "layers": "whole blocks, removed from a model folder",
}


def tensor_names(arguments: Iterable[str]) -> list[Completion]:
    """The layers and tensors of the first model among the arguments."""
    for argument in arguments:
        model = attempt(open_model, Path(argument))
        if not isinstance(model, PrunectlError):
            layers = {tensor.layer: tensor.kind or "layer" for tensor in model.tensors if tensor.layer}
            tensors = {tensor.name: f"{'x'.join(map(str, tensor.shape))} {tensor.role}" for tensor in model.tensors}
            return [Completion(name, line) for name, line in {**layers, **tensors}.items()]
    return []


def _known(kind: str) -> Offers:
    return lambda _: [Completion(choice.name, choice.summary) for choice in choices(kind)]


def _strategies(_: Iterable[str]) -> list[Completion]:
    named = {
        choice.name: choice.summary
        for choice in (*choices("strategies"), *importlib.import_module("prunectl.channels.config").list_importances())
    }
    return [Completion(name, line) for name, line in named.items()]


def _matching(values: Iterable[str] | Mapping[str, str]) -> Offers:
    summaries = values if isinstance(values, Mapping) else dict.fromkeys(values, "")
    return lambda _: [Completion(value, line) for value, line in summaries.items()]


OFFERS: Mapping[str, Offers] = {
    "layer": tensor_names,
    "layers": tensor_names,
    "exclude": tensor_names,
    "freeze": tensor_names,
    "strategy": _strategies,
    "strategies": _strategies,
    "schedule": _known("schedules"),
    "schedules": _known("schedules"),
    "policy": _known("policies"),
    "scopes": _matching(map(str, Scope)),
    "pattern": _matching(PATTERNS),
    "patterns": _matching({name: line for name, line in PATTERNS.items() if name != LAYERS}),
    "on": _matching({"ray": "Ray on this machine", "ray:": "a Ray cluster, by its address"}),
    "to": _matching({target.name: target.title for target in TARGETS}),
    "report": _matching(f"{name}:" for name in REPORTS),
    "fail_on": _matching(map(str, DiffRule)),
    "lr_schedule": _matching(LR_SCHEDULES),
    "topic": _matching({name: line for name, (_, line) in {**TOPICS, **COMMANDS}.items()}),
    "precision": _matching(("fp32", "bf16", "fp16")),
}
"""Completions by the name of the option."""

OFFERS_OF: Mapping[str, Offers] = {
    "strip --only": _matching(map(str, StripPart)),
    "inspect --pattern": _matching({name: line for name, line in PATTERNS.items() if name != LAYERS}),
    "finetune --pattern": _matching({name: line for name, line in PATTERNS.items() if name not in {CHANNEL, LAYERS}}),
}
"""Completions for a single command, where they differ from those above."""


_LISTS = frozenset({"strategies", "scopes", "patterns", "schedules", "fail_on", "strip --only"})
"""Options with comma-separated values: the last value is completed."""


def attach(command: TyperCommand) -> None:
    """Add completions to the options of a command."""
    for param in command.params:
        full_name = f"{command.name} --{param.name}"
        offers = OFFERS_OF.get(full_name) or OFFERS.get(str(param.name))
        if offers is not None:
            is_list = full_name in _LISTS or param.name in _LISTS
            setattr(param, "shell_complete", _completer(offers, is_list=is_list))  # noqa: B010 - a method, to mypy


def _completer(
    complete_values: Callable[[Iterable[str]], Iterable[Completion]], *, is_list: bool
) -> Callable[[Any, str], Any]:
    def complete(ctx: Any, incomplete: str) -> list[Completion]:
        head, comma, last = incomplete.rpartition(",") if is_list else ("", "", incomplete)
        try:
            matching = [offer for offer in complete_values(_arguments(ctx)) if offer.value.startswith(last)]
        except Exception:  # noqa: BLE001 - an error cannot be shown in the middle of a command line
            return []
        return [replace(offer, value=f"{head}{comma}{offer.value}") for offer in matching]

    return complete


def _arguments(ctx: Any) -> list[str]:
    """The positional arguments, among them the model."""
    values = [ctx.params.get(param.name) for param in ctx.command.params if isinstance(param, TyperArgument)]
    arguments = [value for value in values for value in (value if isinstance(value, list | tuple) else (value,))]
    # An option without its value yet ends the parsing before arguments are assigned: they are still in ctx.args.
    return [str(value) for value in (*arguments, *ctx.args) if value]


BREAKS = frozenset("=:")


@dataclass(frozen=True, slots=True)
class BashWords:
    """The words of a line up to the cursor, joined again where bash has split them at `=` and `:`."""

    words: tuple[str, ...]
    """All words; the last one is to be completed."""
    head: str
    """The beginning of the last word that bash keeps, and that completions must not repeat."""

    @classmethod
    def of(cls, line: str, cursor: int) -> BashWords:
        """Parse COMP_WORDS and COMP_CWORD."""
        parts = _parts(line)[: cursor + 1]
        # A new word is still empty, and splitting at spaces loses it.
        parts += [""] * (cursor + 1 - len(parts))
        words: list[str] = []
        for index, part in enumerate(parts):
            if index > 1 and part and (part in BREAKS or parts[index - 1] in BREAKS):
                words[-1] += part
            else:
                words.append(part)
        last = "" if parts[-1] in BREAKS else parts[-1]
        return cls(tuple(words), _value(words[-1]).removesuffix(last))

    @property
    def line(self) -> str:
        """The words as one line, quoted for a shell."""
        return shlex.join(self.words)

    @property
    def cursor(self) -> int:
        """The index of the last word."""
        return len(self.words) - 1

    def rest(self, answer: str) -> str:
        """The part of a completion that bash appends."""
        return answer.removeprefix(self.head)


def _parts(line: str) -> list[str]:
    """The words of a line as a shell splits it, also if a quotation is not closed yet."""
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    parts: list[str] = []
    try:
        parts.extend(lexer)
    except ValueError:
        parts.append(lexer.token)
    return parts


def _value(word: str) -> str:
    """The value after the equals sign of an option, which alone is completed; else the word."""
    name, sign, value = word.partition("=")
    return value if sign and name.startswith("-") else word


SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")
_ASKING = "complete_bash"
KNOWN = tuple(f"{what}_{shell}" for shell in SHELLS for what in ("complete", "source"))


def complete(command: Any, variable: str) -> int:
    """Answer a completion request, which the shell's script passes in a variable, and return the exit code."""
    request = os.environ[variable]
    if request not in KNOWN:
        raise UsageError(
            f"{variable} is {request!r}, which is not a completion request of any shell",
            did_you_mean=tuple(get_close_matches(request, KNOWN)),
            hint="prunectl --show-completion prints the script for your shell",
        )
    return _answer_bash(command) if request == _ASKING else _exit_code(command)


def _answer_bash(command: Any) -> int:
    words = BashWords.of(os.environ["COMP_WORDS"], int(os.environ["COMP_CWORD"]))
    os.environ |= {"COMP_WORDS": words.line, "COMP_CWORD": str(words.cursor)}
    answers = io.StringIO()
    with contextlib.redirect_stdout(answers):
        code = _exit_code(command)
    sys.stdout.writelines(f"{words.rest(line)}\n" for line in answers.getvalue().splitlines())
    return code


def _exit_code(command: Any) -> int:
    try:
        command.main([], prog_name="prunectl")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0
