"""What is typed with `--max-drop`, as a search: in which folder, and what it says while it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from prunectl.commands.options import spelled
from prunectl.errors import UsageError
from prunectl.formats.scratch import temporary_folder
from prunectl.reporting.reporter import Reporter
from prunectl.reporting.sweep_report import told
from prunectl.sweeping.search import Held, Search, search

_AMOUNTS = ("sparsity", "compression", "target_gzip", "target_packed", "params", "flops", "dead")


def refuse(ctx: typer.Context, others: Mapping[str, str]) -> None:
    """Refuse what says how much goes as well, and others with the reason why."""
    for name in _AMOUNTS:
        if ctx.params.get(name):
            option = spelled(ctx, name)
            raise UsageError(f"{option} and --max-drop both say how much goes", hint=f"leave out {option}")
    for name, why in others.items():
        if ctx.params.get(name):
            raise UsageError(f"{spelled(ctx, name)} does not go with --max-drop: {why}")


@contextmanager
def found(path: Path, asked: Search, tried: Path | None, reporter: Reporter) -> Generator[Held]:
    """Yield what a search came to, its models in the folder that was named or in one that goes away."""

    def run(folder: Path) -> Held:
        return search(path, asked, folder, lambda *made: reporter.note(told(*made)))

    if tried is not None:
        yield run(tried)
    else:
        with temporary_folder() as scratch:
            yield run(scratch)


def noted(words: Mapping[str, Any], is_free: Callable[[str], bool]) -> dict[str, Any]:
    """Return choices as they are noted, those in tables by the names of both, without what decides no number."""
    flat: dict[str, Any] = {}
    for name, value in words.items():
        inner = {f"{name} {key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
        flat |= {key: one for key, one in inner.items() if not is_free(key)}
    plain: dict[str, Any] = json.loads(json.dumps(flat))
    return plain
