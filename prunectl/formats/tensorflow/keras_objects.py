"""What Keras 2 wrote about a model into its SavedModel: layers, training, wrappers, code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.formats import budgets
from prunectl.formats.base import Wrapper
from prunectl.formats.json_text import parse_object, refuse_too_much
from prunectl.formats.keras import config as keras_config
from prunectl.formats.keras.config import PRUNED_PREFIX, part, schedule, text
from prunectl.formats.tensorflow.saved_model_graph import KerasObject

_MODELS = frozenset({"_tf_keras_model", "_tf_keras_sequential", "_tf_keras_network"})
_NOT_LAYERS = frozenset({"_tf_keras_metric", "_tf_keras_input_layer"})


@dataclass(frozen=True, slots=True)
class KerasFacts:
    """What the Keras objects of a SavedModel tell together."""

    classes: Mapping[str, str]
    """Class of each layer, by its name."""
    model: Mapping[str, Any] | None
    """The configuration of the whole model."""
    version: str
    optimizer: str
    training: tuple[str, ...]
    wrappers: tuple[Wrapper, ...]
    code: tuple[str, ...]


def read_facts(path: Path, objects: Iterable[KerasObject]) -> KerasFacts:
    """Return what the Keras objects tell."""
    classes: dict[str, str] = {}
    model: Mapping[str, Any] = {}
    wrappers: dict[Wrapper, None] = {}
    code: dict[str, None] = {}
    described = [found for found in objects if found.identifier.startswith("_tf_keras") and found.metadata]
    refuse_too_much((found.metadata for found in described), path, "its Keras metadata", budgets.MAX_KERAS_OBJECT_BYTES)
    for found in described:
        facts = parse_object(found.metadata, path, "its Keras metadata")
        name, kind = text(facts, "name"), text(facts, "class_name")
        if found.identifier in _MODELS:
            model = model or facts
        elif found.identifier not in _NOT_LAYERS and kind != "PruneLowMagnitude":
            classes.setdefault(name, kind)
        if kind == "PruneLowMagnitude":
            how = schedule(part(part(facts, "config"), "pruning_schedule"))
            wrappers[Wrapper("tfmot", name.removeprefix(PRUNED_PREFIX), how)] = None
        if kind == "Lambda":
            code[f"Lambda layer {name}"] = None
        elif ">" in kind:
            code[f"custom class {kind.rpartition('>')[2]}"] = None
    training = part(model, "training_config")
    return KerasFacts(
        classes=classes,
        model=keras_config.measured(
            {"class_name": model["class_name"], "config": model["config"]} if _has_config(model) else None, path
        ),
        version=text(model, "keras_version"),
        optimizer=keras_config.optimizer(training),
        training=keras_config.training(training),
        wrappers=tuple(wrappers),
        code=tuple(code),
    )


def _has_config(model: Mapping[str, Any]) -> bool:
    return "class_name" in model and bool(part(model, "config"))
