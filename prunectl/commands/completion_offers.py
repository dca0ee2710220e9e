"""Which words there are for each option: a table of functions of the models that were typed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from prunectl.channels.named import measures
from prunectl.commands.app import COMMANDS
from prunectl.commands.topics.table import TOPICS
from prunectl.errors import PrunectlError, attempt
from prunectl.exporting.targets import TARGETS
from prunectl.formats.stripping import Part
from prunectl.formats.table import open_model
from prunectl.gating.diff_gates import Slip
from prunectl.measuring.patterns import CHANNELS
from prunectl.pruning.plan import Scope
from prunectl.reporting.gates.table import FORMATS as REPORTS
from prunectl.training.choices import choices
from prunectl.training.course import RATES


@dataclass(frozen=True, slots=True)
class Offer:
    """A word that a shell may complete to, as Typer hands it on."""

    value: str
    help: str = ""
    type: str = "plain"


Offers = Callable[[Iterable[str]], Iterable[Offer]]
"""Given the arguments that were typed."""

PATTERNS = {
    "unstructured": "any weights",
    "2:4": "two zeros in every four",
    "1:4": "one zero in every four",
    "block:1x4": "four in a row go together",
    "block:4x4": "squares of sixteen go together",
    "block:4x4:max": "the same, by the largest weight of each",
    "channel": "whole channels, which are cut out",
}


def names_in(words: Iterable[str]) -> list[Offer]:
    """Return the layers and tensors of the first model among some words."""
    for word in words:
        model = attempt(open_model, Path(word))
        if not isinstance(model, PrunectlError):
            layers = {tensor.layer: tensor.kind or "layer" for tensor in model.tensors if tensor.layer}
            tensors = {tensor.name: f"{'x'.join(map(str, tensor.shape))} {tensor.role}" for tensor in model.tensors}
            return [Offer(name, line) for name, line in {**layers, **tensors}.items()]
    return []


def _known(kind: str) -> Offers:
    return lambda _: [Offer(choice.name, choice.line) for choice in choices(kind)]


def _strategies(_: Iterable[str]) -> list[Offer]:
    named = {choice.name: choice.line for choice in (*choices("strategies"), *measures())}
    return [Offer(name, line) for name, line in named.items()]


def _these(words: Iterable[str] | Mapping[str, str]) -> Offers:
    lines = words if isinstance(words, Mapping) else dict.fromkeys(words, "")
    return lambda _: [Offer(word, line) for word, line in lines.items()]


OFFERS: Mapping[str, Offers] = {
    "layer": names_in,
    "layers": names_in,
    "only": names_in,
    "exclude": names_in,
    "freeze": names_in,
    "strategy": _strategies,
    "strategies": _strategies,
    "schedule": _known("schedules"),
    "schedules": _known("schedules"),
    "policy": _known("policies"),
    "scopes": _these(map(str, Scope)),
    "pattern": _these(PATTERNS),
    "patterns": _these(PATTERNS),
    "on": _these({"ray": "workers on this machine", "ray:": "a cluster, by its address"}),
    "to": _these({target.name: target.title for target in TARGETS}),
    "report": _these(f"{name}:" for name in REPORTS),
    "fail_on": _these(map(str, Slip)),
    "lr_schedule": _these(RATES),
    "topic": _these({name: line for name, (_, line) in {**TOPICS, **COMMANDS}.items()}),
    "precision": _these(("fp32", "bf16", "fp16")),
}
"""By the name of the option."""

OFFERS_OF: Mapping[str, Offers] = {
    "strip --only": _these(map(str, Part)),
    "finetune --pattern": _these({name: line for name, line in PATTERNS.items() if name != CHANNELS}),
}
"""Where a command means something else by it."""
