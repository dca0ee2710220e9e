"""May this model be rebuilt? Its code does not run unless the user says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prunectl.errors import UntrustedError
from prunectl.formats.base import ModelFile
from prunectl.formats.keras.config import text
from prunectl.training.network import Origin

_OWN_MODULES = frozenset({"keras", "tf_keras", "builtins", "tensorflow", "tensorflow_model_optimization"})
_WRAPPED_OPERATIONS = frozenset({"TFOpLambda", "ClassMethod"})
_REACHING_OUT = ("io.", "raw_ops.", "load_", "saved_model.", "train.")
_CALLING_PYTHON = ("py_func", "numpy_function", "py_function")


def check(model: ModelFile, origin: Origin, known: Mapping[str, Any]) -> None:
    """Refuse a model that brings code, or names code that nobody vouched for."""
    if origin.is_trusted:
        return
    if origin.model:
        # The user's own function builds it: nothing in the file is looked at but numbers.
        return
    named = dict.fromkeys((*model.about.code, *found_in(model.about.keras)))
    facts = [fact for fact in named if not _is_in(fact, known)]
    if not facts:
        return
    custom = all(fact.startswith("custom class ") for fact in facts)
    raise UntrustedError(
        f"{model.path} holds code: {', '.join(facts[:5])}{' …' if len(facts) > 5 else ''}",
        hint="say what these are with --custom-objects mod:DICT, or build the model with --model mod:fn"
        if custom
        else "if you trust where it comes from: --trust; or build the model with --model mod:fn",
    )


def found_in(config: Any) -> tuple[str, ...]:
    """Return what would run on loading, wherever in a configuration it hides."""
    return tuple(dict.fromkeys(_facts(config)))


def _facts(found: Any) -> Iterator[str]:
    pending = [found]
    while pending:
        one = pending.pop()
        if isinstance(one, Mapping):
            yield from _fact(one)
            pending.extend(one.values())
        elif isinstance(one, list | tuple):
            pending.extend(one)


def _fact(one: Mapping[str, Any]) -> Iterator[str]:
    kind, config = text(one, "class_name"), one.get("config")
    name = text(config, "name")
    if kind == "Lambda":
        yield f"Lambda layer {name}"
    elif kind == "__lambda__":
        yield "a function"
    elif kind in _WRAPPED_OPERATIONS and _is_dangerous(text(config, "function")):
        yield f"operation {text(config, 'function')}"
    elif kind and _is_of_others(one):
        yield f"custom class {kind.rpartition('>')[2]}"


def _is_of_others(one: Mapping[str, Any]) -> bool:
    module, registered = text(one, "module"), text(one, "registered_name")
    if module:
        return module.partition(".")[0] not in _OWN_MODULES
    return ">" in registered or ">" in text(one, "class_name")


def _is_dangerous(function: str) -> bool:
    return function.startswith(_REACHING_OUT) or any(word in function for word in _CALLING_PYTHON)


def _is_in(fact: str, known: Mapping[str, Any]) -> bool:
    names = {name.rpartition(">")[2] for name in known}
    return fact.startswith("custom class ") and fact.removeprefix("custom class ") in names
