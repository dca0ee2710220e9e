"""A file of Keras 2 with tfmot's wrappers around its layers, as tfmot itself would have saved it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.errors import InputError, UsageError
from prunectl.formats.base import ModelFile
from prunectl.formats.keras import fit
from prunectl.formats.optional import require
from prunectl.measuring.patterns import Block
from prunectl.pruning.schedules import Schedule
from prunectl.training import trusted
from prunectl.training.keras import numbers
from prunectl.training.keras.layout import Layout, layout
from prunectl.training.keras.library import keras_two, quietly
from prunectl.training.keras.loading import Loaded, load
from prunectl.training.keras.names import named
from prunectl.training.keras.place import Place
from prunectl.training.keras.said import said
from prunectl.training.tfmot.layers import Around, Settings, around
from prunectl.training.tfmot.library import tfmot
from prunectl.training.wrap.schedules import is_tfmots
from prunectl.training.wrap.wrapping import Wrapping

_MATRIX = 2


def wrap(model: ModelFile, wrapping: Wrapping, target: Path) -> tuple[str, ...]:
    """Write the copy, and return the tensors that tfmot has no wrapper for."""
    loaded = _loaded(model, wrapping)
    variables = named(loaded.file, loaded.library, loaded.model.weights, loaded.fill)
    names = {id(variable): name for name, variable in variables.items() if name in wrapping.names}

    def choose(layer: Any, weights: Mapping[str, Any]) -> Settings | None:
        return _scheduled(layer, weights, wrapping) if wrapping.schedules else _held(weights, wrapping)

    found = around(loaded.library.keras, loaded.model, names, choose)
    if not found.wrappers:
        raise InputError(
            f"{model.path} has no layer to prune that tfmot has a wrapper for", hint="prune without --wrap"
        )
    for name, keep in wrapping.masks.items():
        value = numbers.read(loaded.library, variables[name])
        numbers.write(loaded.library, variables[name], np.where(keep, value, np.zeros((), value.dtype)))
        if name in found.weights:
            numbers.write(loaded.library, found.weights[name][1], keep)
    for wrapper in found.wrappers:
        numbers.write(loaded.library, wrapper.pruning_step, np.array(wrapping.step))
    _compile(loaded, found)
    _tell_apart(found)
    _save(found.model, layout(model), target)
    return tuple(name for name in wrapping.names if name not in found.weights)


def _loaded(model: ModelFile, wrapping: Wrapping) -> Loaded:
    # Whatever can be told by the file itself is told before TensorFlow is imported.
    trusted.check(model, wrapping.origin)
    if model.about.keras is None:
        raise InputError(
            f"{model.path} holds weights alone, and a wrapper is part of a model",
            hint="wrap the file that holds the model, or prune without --wrap",
        )
    if layout(model) is Layout.FOLDER and not all(map(is_tfmots, wrapping.schedules.values())):
        raise UsageError(
            "in a SavedModel, tfmot can keep a constant or a polynomial schedule alone",
            hint="save the model as .h5, or give the schedule to prunectl finetune",
        )
    if "keras 3" in model.about.producer:
        raise InputError(
            f"{model.path} is of Keras 3, and tfmot prunes models of Keras 2 only",
            hint="prune without --wrap: prunectl finetune takes a --schedule for any Keras",
        )
    fit.check(model)
    keras_two()
    tfmot()
    return load(model, wrapping.origin, Place())


def _held(weights: Mapping[str, Any], wrapping: Wrapping) -> Settings:
    """Return what keeps masks as they are, whoever trains on."""
    masks = [wrapping.masks[name] for name in weights if name in wrapping.masks]
    size = sum(mask.size for mask in masks)
    zeros = size - sum(int(np.count_nonzero(mask)) for mask in masks)
    # tfmot counts its steps from 1, so that a schedule which ends at 0 has no turn: masks that tfmot would not make by
    # itself, in groups, in blocks of images or ranked over all layers, stay what they are.
    schedule = tfmot().ConstantSparsity(min(zeros, size - 1) / size, begin_step=0, end_step=0, frequency=1)
    return {"pruning_schedule": schedule, **_blocks(weights, wrapping)}


def _scheduled(layer: Any, weights: Mapping[str, Any], wrapping: Wrapping) -> Settings | None:
    """Return the schedule of a layer, which all of its weights share."""
    if isinstance(wrapping.pattern, Block) and any(len(weight.shape) != _MATRIX for weight in weights.values()):
        return None
    schedules = {wrapping.schedules[name] for name in weights}
    if len(weights) != len(layer.get_prunable_weights()) or len(schedules) != 1:
        raise UsageError(
            f"tfmot prunes all weights of {layer.name} along one schedule, to one sparsity",
            hint=f"choose all or none of {layer.name}, with the same --layer ratio, or leave out --schedule",
        )
    return {"pruning_schedule": _native(schedules.pop()), **_blocks(weights, wrapping)}


def _native(schedule: Schedule) -> Any:
    found: Any = require("prunectl.training.tfmot.schedules", extra="tensorflow").native_of(schedule)
    return found


def _blocks(weights: Mapping[str, Any], wrapping: Wrapping) -> Settings:
    pattern = wrapping.pattern
    if not isinstance(pattern, Block) or any(len(weight.shape) != _MATRIX for weight in weights.values()):
        return {}
    return {"block_size": (pattern.rows, pattern.columns), "block_pooling_type": wrapping.pool.value.upper()}


def _compile(loaded: Loaded, found: Around) -> None:
    """Let the wrapped model be trained as the file says of its own; without one, or with an unknown one, not at all."""
    parts = said(loaded.file)
    if "optimizer" not in parts or "loss" not in parts:
        return
    config = {"metrics": None, "weighted_metrics": None, "loss_weights": None, **parts}
    optimizer = config.pop("optimizer")
    config["optimizer_config"] = {"class_name": optimizer, "config": {}} if isinstance(optimizer, str) else optimizer
    saving = require("tf_keras.src.saving.legacy.saving_utils", extra="tensorflow")
    try:
        loaded.vouch_for(parts)
        with quietly():
            words = saving.compile_args_from_training_config(config, dict(loaded.objects))
            if isinstance(parts["loss"], str):
                # Saved again as the name that it is, not as the function.
                words["loss"] = parts["loss"]
            found.model.compile(**words)
    except (ValueError, TypeError, AttributeError, KeyError):
        # A loss or a metric of the user's own: whoever trains on has to name it anyway.
        return


def _tell_apart(found: Around) -> None:
    """Give the masks of a layer with several of them names of their own, without which HDF5 cannot hold them."""
    for wrapper in found.wrappers:
        for at, (_, mask, threshold) in enumerate(wrapper.pruning_vars[1:], 1):
            for variable in (mask, threshold):
                # The name is told when a variable is made, which tfmot does.
                variable._handle_name = variable.name.replace(":", f"_{at}:")  # noqa: SLF001


def _save(model: Any, kind: Layout, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".wrapped-") as folder, quietly():
        # By its suffix Keras knows which format is meant, and the user may have chosen another.
        place = Path(folder) / (kind.value or "model")
        model.save(str(place), **({"save_format": "tf"} if kind is Layout.FOLDER else {}))
        os.replace(place, target)
