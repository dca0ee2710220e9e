"""The topics of `prunectl help`, each imported only when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from textwrap import fill

from prunectl.pruning.choices import Choice, choices

WIDTH = 80
"""Of a terminal that nobody has made wider."""
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


def topic_lines(topic: str) -> tuple[str, ...]:
    """The text of a topic, line by line."""
    text: str = getattr(importlib.import_module("prunectl.commands.help.topics"), f"{TOPICS[topic][0]}_text")()
    return tuple(text.strip().splitlines())


def builtin_rows(kind: str) -> list[Choice]:
    """What is built in of a kind: these texts are the same wherever prunectl runs."""
    return [choice for choice in choices(kind) if choice.source == "built in"]


def aligned(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of names and their meanings, in two columns."""
    known = list(pairs)
    width = max(len(name) for name, _ in known) + 4
    return "\n".join(
        fill(line, WIDTH, initial_indent=f"  {name}".ljust(width), subsequent_indent=" " * width) or f"  {name}"
        for name, line in known
    )
