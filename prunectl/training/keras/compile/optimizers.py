"""Optimizers, from `NAME:key=value,...` or from a file's configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunectl.formats.keras.config import named, part
from prunectl.training.keras.backend import KerasLibrary
from prunectl.training.request import parse_optimizer

_NOT_FOR_USERS = frozenset({"Optimizer", "LossScaleOptimizer"})
_CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")
_BASE_PARAMETERS = (
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
)


@dataclass(frozen=True, slots=True)
class ScheduledOptimizer:
    """An optimizer, and the schedule that the file has its rate follow, if there is one."""

    optimizer: Any
    schedule: Any = None


def optimizer_by_name(library: KerasLibrary, text: str, *, lr: float | None, clip: float | None) -> ScheduledOptimizer:
    """The optimizer that a user asks for."""
    spec = parse_optimizer(text)
    cls, settings = spec.resolve(_optimizer_classes(library), _parameters, "learning_rate")
    if lr is not None:
        settings["learning_rate"] = float(lr)
    return ScheduledOptimizer(spec.construct(cls, **_with_clipping(settings, clip)))


def optimizer_from_config(
    library: KerasLibrary,
    entry: Mapping[str, Any] | str,
    objects: Mapping[str, Any],
    *,
    lr: float | None,
    clip: float | None,
) -> ScheduledOptimizer:
    """A new optimizer of the kind that a file names; KeyError if that is unknown here."""
    if isinstance(entry, str):
        return optimizer_by_name(library, entry, lr=lr, clip=clip)
    name = named(entry)
    settings = dict(part(entry, "config"))
    if "LossScaleOptimizer" in name:
        # Keras puts one around the optimizer of every model that needs it.
        inner = settings.get("inner_optimizer")
        return optimizer_from_config(library, inner if isinstance(inner, dict) else {}, objects, lr=lr, clip=clip)
    cls = objects.get(name) or _optimizer_classes(library)[name.lower()]
    settings = _upgrade_settings(library, settings)
    if lr is not None:
        settings["learning_rate"] = float(lr)
    rate, schedule = settings.get("learning_rate"), None
    if isinstance(rate, library.keras.optimizers.schedules.LearningRateSchedule):
        settings["learning_rate"], schedule = float(rate(0)), rate
    parameters = _parameters(cls)
    optimizer = cls(**{key: value for key, value in _with_clipping(settings, clip).items() if key in parameters})
    return ScheduledOptimizer(optimizer, schedule)


def _upgrade_settings(library: KerasLibrary, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of an optimizer, those of older Keras versions under their current names."""
    rate = settings.pop("lr", settings.get("learning_rate"))
    decay = settings.pop("decay", 0.0) or 0.0
    schedules = library.keras.optimizers.schedules
    if isinstance(rate, dict):
        rate = schedules.deserialize(rate)
    elif isinstance(rate, int | float) and decay:
        rate = schedules.InverseTimeDecay(float(rate), decay_steps=1, decay_rate=float(decay))
    upgraded = {key: value for key, value in settings.items() if value is not None and key != "learning_rate"}
    return {**upgraded, "learning_rate": rate} if rate is not None else upgraded


def _optimizer_classes(library: KerasLibrary) -> dict[str, Any]:
    optimizers = library.keras.optimizers
    members = {name: getattr(optimizers, name) for name in dir(optimizers) if name not in _NOT_FOR_USERS}
    return {
        name.lower(): cls
        for name, cls in members.items()
        if isinstance(cls, type) and issubclass(cls, optimizers.Optimizer)
    }


def _parameters(cls: Any) -> frozenset[str]:
    parameters = inspect.signature(cls.__init__).parameters.values()
    names = {
        parameter.name
        for parameter in parameters
        if parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
    }
    has_kwargs = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return frozenset((names | (set(_BASE_PARAMETERS) if has_kwargs else set())) - {"self", "name", "jit_compile"})


def _with_clipping(settings: dict[str, Any], clip: float | None) -> dict[str, Any]:
    if clip is None:
        return settings
    return {**{key: value for key, value in settings.items() if key not in _CLIPS}, "global_clipnorm": float(clip)}
