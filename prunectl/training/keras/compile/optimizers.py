"""Which optimizer? `NAME:key=value,...` as users write it, or as a file words it."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from prunectl.errors import UsageError
from prunectl.formats.keras.config import named, part
from prunectl.training.keras.backend import Library

DEFAULT = "adam"
_NOT_FOR_USERS = frozenset({"Optimizer", "LossScaleOptimizer"})
_ALIASES = {"lr": "learning_rate"}
_CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")
_BASE_WORDS = (
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
)


@dataclass(frozen=True, slots=True)
class ChosenOptimizer:
    """An optimizer, and the schedule that the file has its rate follow, if there is one."""

    optimizer: Any
    schedule: Any = None


def wanted(library: Library, text: str, *, lr: float | None, clip: float | None) -> ChosenOptimizer:
    """The optimizer that a user asks for."""
    name, _, rest = (text or DEFAULT).partition(":")
    kinds = _kinds(library)
    kind = kinds.get(name.strip().lower().replace("-", "").replace("_", ""))
    if kind is None:
        raise UsageError(
            f"no optimizer is called {name}",
            did_you_mean=tuple(get_close_matches(name.lower(), kinds, n=3, cutoff=0.5)),
            hint=f"known: {', '.join(sorted(kinds))}",
        )
    settings = dict(_setting(name, word, kind) for word in rest.split(",") if word.strip())
    if lr is not None:
        settings["learning_rate"] = float(lr)
    return ChosenOptimizer(_made(name, kind, _clipped(settings, clip)))


def of_file(
    library: Library,
    entry: Mapping[str, Any] | str,
    objects: Mapping[str, Any],
    *,
    lr: float | None,
    clip: float | None,
) -> ChosenOptimizer:
    """A new optimizer of the kind that a file names; KeyError if that is unknown here."""
    if isinstance(entry, str):
        return wanted(library, entry, lr=lr, clip=clip)
    name = named(entry)
    settings = dict(part(entry, "config"))
    if "LossScaleOptimizer" in name:
        # Keras puts one around the optimizer of every model that needs it.
        inner = settings.get("inner_optimizer")
        return of_file(library, inner if isinstance(inner, dict) else {}, objects, lr=lr, clip=clip)
    kind = objects.get(name) or _kinds(library)[name.lower()]
    settings = _modern(library, settings)
    if lr is not None:
        settings["learning_rate"] = float(lr)
    rate, schedule = settings.get("learning_rate"), None
    if isinstance(rate, library.keras.optimizers.schedules.LearningRateSchedule):
        settings["learning_rate"], schedule = float(rate(0)), rate
    known = _words(kind)
    made = kind(**{key: value for key, value in _clipped(settings, clip).items() if key in known})
    return ChosenOptimizer(made, schedule)


def _modern(library: Library, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of an optimizer, those of older Kerases in the words of today."""
    rate = settings.pop("lr", settings.get("learning_rate"))
    decay = settings.pop("decay", 0.0) or 0.0
    schedules = library.keras.optimizers.schedules
    if isinstance(rate, dict):
        rate = schedules.deserialize(rate)
    elif isinstance(rate, int | float) and decay:
        rate = schedules.InverseTimeDecay(float(rate), decay_steps=1, decay_rate=float(decay))
    modern = {key: value for key, value in settings.items() if value is not None and key != "learning_rate"}
    return {**modern, "learning_rate": rate} if rate is not None else modern


def _kinds(library: Library) -> dict[str, Any]:
    optimizers = library.keras.optimizers
    found = {name: getattr(optimizers, name) for name in dir(optimizers) if name not in _NOT_FOR_USERS}
    return {
        name.lower(): kind
        for name, kind in found.items()
        if isinstance(kind, type) and issubclass(kind, optimizers.Optimizer)
    }


def _setting(name: str, word: str, kind: Any) -> tuple[str, Any]:
    key, equals, value = (piece.strip() for piece in word.partition("="))
    if not equals:
        raise UsageError(
            f"{word.strip()!r} sets nothing in --optimizer {name}", hint=f"write {name}:key=value,key=value"
        )
    key = _ALIASES.get(key, key)
    known = _words(kind)
    if key not in known:
        raise UsageError(
            f"{name} has no setting {key}",
            did_you_mean=tuple(get_close_matches(key, known, n=3, cutoff=0.5)),
            hint=f"it has {', '.join(sorted(known))}",
        )
    return key, _value(value)


def _words(kind: Any) -> frozenset[str]:
    parameters = inspect.signature(kind.__init__).parameters.values()
    plain = {one.name for one in parameters if one.kind in {one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY}}
    has_more = any(one.kind is one.VAR_KEYWORD for one in parameters)
    return frozenset((plain | (set(_BASE_WORDS) if has_more else set())) - {"self", "name", "jit_compile"})


def _value(text: str) -> Any:
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _clipped(settings: dict[str, Any], clip: float | None) -> dict[str, Any]:
    if clip is None:
        return settings
    return {**{key: value for key, value in settings.items() if key not in _CLIPS}, "global_clipnorm": float(clip)}


def _made(name: str, kind: Any, settings: dict[str, Any]) -> Any:
    try:
        return kind(**settings)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{name} cannot be set up like that: {error}") from error
