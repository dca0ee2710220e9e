"""What a shell offers after an option: names in the model that was typed, and names that prunectl knows.

Imported only where a shell asks, which is while somebody waits for a key: no weight is read, and nothing is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from typer.core import TyperArgument, TyperCommand

from prunectl.commands.completion_offers import OFFERS, OFFERS_OF, Offer

_LISTS = frozenset({"strategies", "scopes", "patterns", "schedules", "fail_on", "strip --only"})
"""Options whose words commas separate: the last of them is completed."""


def attach(command: TyperCommand) -> None:
    """Let the options of a command offer what they take."""
    for param in command.params:
        own = f"{command.name} --{param.name}"
        offers = OFFERS_OF.get(own) or OFFERS.get(str(param.name))
        if offers is not None:
            is_list = own in _LISTS or param.name in _LISTS
            setattr(param, "shell_complete", _completer(offers, is_list=is_list))  # noqa: B010 - a method, to mypy


def _completer(offers: Callable[[Iterable[str]], Iterable[Offer]], *, is_list: bool) -> Callable[[Any, str], Any]:
    def complete(ctx: Any, incomplete: str) -> list[Offer]:
        head, comma, last = incomplete.rpartition(",") if is_list else ("", "", incomplete)
        try:
            found = [offer for offer in offers(_arguments(ctx)) if offer.value.startswith(last)]
        except Exception:  # noqa: BLE001 - a shell that waits for words has no place for an error
            return []
        return [replace(offer, value=f"{head}{comma}{offer.value}") for offer in found]

    return complete


def _arguments(ctx: Any) -> list[str]:
    """Return the words that were typed without an option, where models stand."""
    given = [ctx.params.get(param.name) for param in ctx.command.params if isinstance(param, TyperArgument)]
    words = [word for value in given for word in (value if isinstance(value, list | tuple) else (value,))]
    # An option that has no value yet ends the parsing before any argument has its place.
    return [str(word) for word in (*words, *ctx.args) if word]
