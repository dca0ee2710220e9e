"""Optimizers as they are written on the command line: `sgd:momentum=0.9,weight_decay=1e-4`."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import torch

from prunectl.errors import UsageError

DEFAULT = "adam"
DEFAULT_RATE = 1e-3


def optimizer(words: str, parameters: Iterable[torch.nn.Parameter], rate: float | None) -> torch.optim.Optimizer:
    """Return the optimizer that is meant."""
    name, _, rest = (words or DEFAULT).partition(":")
    known = {
        one.lower(): kind
        for one, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
    }
    if name.lower() not in known:
        raise UsageError(
            f"PyTorch has no optimizer {name}",
            did_you_mean=tuple(get_close_matches(name.lower(), known)),
            hint=f"it has {', '.join(known)}",
        )
    kind: Any = known[name.lower()]
    taken = list(inspect.signature(kind).parameters)[1:]
    found: dict[str, Any] = {"lr": DEFAULT_RATE}
    for word in filter(None, _split(rest)):
        key, sign, text = word.partition("=")
        if key not in taken or not sign:
            raise UsageError(
                f"the optimizer {name} takes no {key}",
                did_you_mean=tuple(get_close_matches(key, taken)),
                hint=f"it takes {', '.join(taken)}, as in {name}:{taken[0]}=0.01",
            )
        found[key] = _value(text)
    if rate is not None:
        found["lr"] = rate
    try:
        made: torch.optim.Optimizer = kind(list(parameters), **found)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the optimizer {name} refuses its parameters: {error}") from error
    return made


def _split(text: str) -> list[str]:
    """Split at the commas that no parentheses enclose: betas=(0.9,0.99) is one word."""
    words, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            words.append("")
        else:
            words[-1] += letter
    return words


def _value(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError) as error:
        raise UsageError(f"{text!r} is no number") from error
