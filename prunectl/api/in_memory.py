"""Objects in memory that options name: data, functions and classes, which are found under a name while a call runs."""

from __future__ import annotations

import copy
import inspect
import os
import re
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

from prunectl.errors import UsageError, first_line
from prunectl.training.request import MAX, MIN

_OBJECTS = frozenset({"data", "val", "loss", "train_step", "metric", "builder", "distill_builder", "custom_objects"})
_DATA = frozenset({"data", "val"})
_BUILDERS = frozenset({"builder", "distill_builder"})
_named: dict[str, Any] = {}
_naming = threading.Lock()
_FULL_NAME = re.compile(rf"\b{re.escape(__name__)}:(?=\w)")


def __getattr__(name: str) -> Any:
    """An object that is registered while a call runs, by its name: `prunectl.api.in_memory:data` in a request."""
    try:
        return _named[name]
    except KeyError:
        raise AttributeError(f"no object is called {name} now") from None


@contextmanager
def named_objects(options: Mapping[str, Any]) -> Generator[dict[str, Any]]:
    """Yield the options with objects replaced by names, under which they are registered until the context ends."""
    registered: list[str] = []
    try:
        yield {
            name: _name_of(name, value, registered) if name in _OBJECTS else value for name, value in options.items()
        }
    finally:
        for name in registered:
            del _named[name]


def by_own_names(result: Any) -> Any:
    """A result in which objects have their own names: a metric `f1` is f1, and not what it was found by."""
    if isinstance(result, str):
        return _FULL_NAME.sub("", result)
    if isinstance(result, tuple | list):
        named = [by_own_names(item) for item in result]
        return type(result)(named) if named != [*result] and type(result) in {tuple, list} else result
    if isinstance(result, dict):
        return {by_own_names(key): by_own_names(value) for key, value in result.items()}
    if not is_dataclass(result) or isinstance(result, type):
        return result
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    changed = {name: new for name, old in values.items() if (new := by_own_names(old)) is not old and new != old}
    return replace(result, **changed) if changed else result


def is_in_memory(values: Iterable[Any]) -> bool:
    """Whether one of these names is that of an object in memory, which is gone when the call is over."""
    return any(isinstance(value, str) and value.startswith(f"{__name__}:") for value in values)


def _name_of(option: str, value: Any, registered: list[str]) -> Any:
    if option == "metric":
        metrics = value if isinstance(value, list | tuple) and not _has_direction(value) else [value]
        return tuple(_metric(metric, registered) for metric in metrics)
    if isinstance(value, str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if option in _DATA and isinstance(value, Iterator) and not _can_restart(value):
        raise TypeError(
            f"{option} must not be an iterator, which can be read only once: write a function that returns one, "
            f"such as {option}=lambda: batches()"
        )
    return _register(option, value, registered)


def _can_restart(value: Iterator[Any]) -> bool:
    """Whether an iterator is a loader that can restart, like those of Keras 2 and DALI, unlike generators or zip."""
    return any(hasattr(value, name) for name in ("__len__", "__getitem__", "reset"))


def _has_direction(value: Any) -> bool:
    """Whether a value is a metric with its direction: `(function, "max")`."""
    return isinstance(value, tuple) and len(value) == 2 and value[1] in (MAX, MIN)


def _metric(value: Any, registered: list[str]) -> str:
    metric, direction = value if _has_direction(value) else (value, "")
    if not isinstance(metric, str) and not callable(metric):
        raise TypeError(f"metric must be a name or a function, not {type(metric).__name__}")
    name = metric if isinstance(metric, str) else _register("metric", metric, registered)
    return f"{name}:{direction}" if direction else name


def _as_registered(option: str, value: Any) -> Any:
    """The object to register: data, and a model given as `builder`, become functions that return them."""
    if option in _DATA:
        return value if inspect.isroutine(value) else lambda: value
    if option in _BUILDERS and not inspect.isclass(value) and not inspect.isroutine(value):
        return builder_of(value)
    return value


def builder_of(model: Any) -> Callable[[], Any]:
    """A builder that returns a copy of a model each time, so that training does not change the caller's model."""
    return model if not hasattr(model, "state_dict") else lambda: copy_of(model)


def copy_of(model: Any) -> Any:
    """A copy of a module, also of one with weights computed from others, which `copy.deepcopy` alone refuses."""
    tensor = sys.modules["torch"].Tensor
    held = _held(vars(module) for module in model.modules())
    computed = {id(value): value.detach().clone() for value in held if isinstance(value, tensor) and not value.is_leaf}
    try:
        return copy.deepcopy(model, computed)
    except Exception as error:  # whatever is in it
        raise UsageError(
            f"{type(model).__name__} cannot be copied: {first_line(error)}",
            hint="prune the module itself with in_place=True, without data, or its file",
        ) from error


def _held(values: Iterable[Any]) -> Iterator[Any]:
    """Values, and what their dicts, lists and tuples hold at any depth."""
    waiting, seen = [*values], set()
    while waiting:
        value = waiting.pop()
        yield value
        if isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)


def _register(option: str, value: Any, registered: list[str]) -> str:
    """Register an object under a unique name: that of the function or class, or of the option."""
    own = str(getattr(value, "__name__", ""))
    first = own if own.isidentifier() else option
    with _naming:
        number, name = 1, first
        while name in _named or name in globals():
            number += 1
            name = f"{first}_{number}"
        _named[name] = _as_registered(option, value)
    registered.append(name)
    return f"{__name__}:{name}"
