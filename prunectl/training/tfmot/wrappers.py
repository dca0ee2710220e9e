"""Wraps layers of a model for tfmot; the wrapped model shares the variables of the original."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prunectl.analysis.patterns import BlockPattern
from prunectl.errors import InputError, UsageError
from prunectl.formats.base import ModelFile
from prunectl.formats.keras import layouts
from prunectl.pruning.masks import Pooling
from prunectl.training import user_code
from prunectl.training.keras import backend
from prunectl.training.keras._compat import compile_arguments, flat_layers, is_graph_network, rename
from prunectl.training.keras.backend import DevicePlacement, load_keras2, load_tfmot
from prunectl.training.keras.compile import read_training_config
from prunectl.training.keras.load import LoadedModel, WeightLayout, detect_layout, load
from prunectl.training.keras.variable_names import match_variables
from prunectl.training.quiet import ignore_warnings
from prunectl.training.wrap import WrapperSpec, has_tfmot_class

WrapperSettings = Mapping[str, Any]
"""Arguments of `prune_low_magnitude` besides the layer."""
SettingsChooser = Callable[[Any, Mapping[str, Any]], WrapperSettings | None]
"""From a layer and its prunable weights by name to the settings of its wrapper; None for no wrapper."""


@dataclass(slots=True)
class WrappedModel:
    """A model with wrappers."""

    model: Any
    weights: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """The prunable variables of wrapped layers, weight and mask, by the name of the tensor."""
    wrappers: list[Any] = field(default_factory=list)


def wrap_layers(keras: Any, model: Any, names: Mapping[int, str], choose: SettingsChooser) -> WrappedModel:
    """A model that shares all variables with another, with wrappers around the layers that are chosen."""
    if not is_cloneable(keras, model):
        raise InputError(
            "tfmot can wrap only sequential and functional models, not subclassed ones",
            hint="prune without --wrap",
        )
    if is_mixed_precision(model):
        raise InputError(
            "tfmot cannot wrap models with mixed precision",
            hint="prune without --wrap",
        )
    sparsity = load_tfmot()

    def cloned(layer: Any) -> Any:
        if isinstance(layer, keras.Model):
            if not is_cloneable(keras, layer):
                return layer
            return keras.models.clone_model(layer, clone_function=cloned)
        variables = {id(weight) for weight in layer.weights}
        if not any(variable in names for variable in variables):
            return layer
        weights = {names[id(weight)]: weight for weight in prunable_weights(layer) if id(weight) in names}
        settings = choose(layer, weights) if weights else None
        return layer if settings is None else sparsity.prune_low_magnitude(layer, **settings)

    with ignore_warnings():
        wrapped = WrappedModel(keras.models.clone_model(model, clone_function=cloned))
    for wrapper in wrappers(keras, wrapped.model):
        wrapped.wrappers.append(wrapper)
        for weight, mask, _ in wrapper.pruning_vars:
            if id(weight) in names:
                wrapped.weights[names[id(weight)]] = (weight, mask)
    return wrapped


def prunable_weights(layer: Any) -> list[Any]:
    """The weights of a layer that tfmot would prune; none if it has no wrapper for such layers."""
    if not hasattr(layer, "get_prunable_weights"):
        try:
            # This wrapper is not used: making one raises ValueError for a layer that tfmot does not know, and gives
            # other layers the method `get_prunable_weights`.
            load_tfmot().prune_low_magnitude(layer)
        except ValueError:
            return []
    weights: list[Any] = list(layer.get_prunable_weights())
    return weights


def wrappers(keras: Any, model: Any) -> Iterator[Any]:
    """Yield the wrappers in a model and in nested models."""
    kind = type(load_tfmot().prune_low_magnitude(keras.layers.Dense(1)))
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from wrappers(keras, layer)
        elif isinstance(layer, kind):
            yield layer


def is_mixed_precision(model: Any) -> bool:
    """Whether any layer computes in another precision than its variables have."""
    policies = (getattr(layer, "dtype_policy", None) for layer in flat_layers(model))
    return any(policy is not None and policy.compute_dtype != policy.variable_dtype for policy in policies)


def is_cloneable(keras: Any, model: Any) -> bool:
    """Whether a model is sequential or functional, so that Keras can clone it layer by layer."""
    return isinstance(model, keras.Sequential) or is_graph_network(model)


MATRIX_RANK = 2


def wrap(model: ModelFile, wrapping: WrapperSpec, target: Path) -> tuple[str, ...]:
    """Write a wrapped copy of a model, and return the selected tensors that tfmot could not wrap."""
    loaded = _load(model, wrapping)
    variables = match_variables(loaded.file, loaded.library, loaded.model.weights, loaded.load_weights)
    names = {id(variable): name for name, variable in variables.items() if name in wrapping.names}

    def choose(layer: Any, weights: Mapping[str, Any]) -> WrapperSettings | None:
        return (
            _settings_of_layer(layer, weights, wrapping)
            if wrapping.schedules
            else _constant_sparsity(weights, wrapping)
        )

    wrapped = wrap_layers(loaded.library.keras, loaded.model, names, choose)
    if not wrapped.wrappers:
        raise InputError(f"{model.path} has no layer that tfmot can wrap", hint="prune without --wrap")
    for name, keep in wrapping.masks.items():
        value = backend.get_value(loaded.library, variables[name])
        backend.set_value(variables[name], np.where(keep, value, np.zeros((), value.dtype)))
        if name in wrapped.weights:
            backend.set_value(wrapped.weights[name][1], keep)
    for wrapper in wrapped.wrappers:
        backend.set_value(wrapper.pruning_step, np.array(wrapping.step))
    _compile(loaded, wrapped)
    _rename_masks(wrapped)
    _save(wrapped.model, detect_layout(model), target)
    return tuple(name for name in wrapping.names if name not in wrapped.weights)


def _load(model: ModelFile, wrapping: WrapperSpec) -> LoadedModel:
    # Errors that can be found in the file alone are raised before TensorFlow is imported.
    user_code.check(model, wrapping.origin)
    if model.about.keras is None:
        raise InputError(
            f"{model.path} holds only weights, but a wrapper is part of a model",
            hint="wrap the file that holds the model, or prune without --wrap",
        )
    if detect_layout(model) is WeightLayout.SAVED_MODEL and not all(map(has_tfmot_class, wrapping.schedules.values())):
        raise UsageError(
            "a SavedModel can hold only a constant or polynomial schedule of tfmot",
            hint="save the model as .h5, or use prunectl finetune --schedule",
        )
    if "keras 3" in model.about.producer:
        raise InputError(
            f"{model.path} is a Keras 3 model, but tfmot supports only Keras 2",
            hint="prune without --wrap, or use prunectl finetune --schedule, which works with any Keras",
        )
    layouts.check_widths(model)
    load_keras2()
    load_tfmot()
    return load(model, wrapping.origin, DevicePlacement())


def _constant_sparsity(weights: Mapping[str, Any], wrapping: WrapperSpec) -> WrapperSettings:
    """The settings of a wrapper that keeps its masks as they are in further training."""
    masks = [wrapping.masks[name] for name in weights if name in wrapping.masks]
    size = sum(mask.size for mask in masks)
    zeros = size - sum(int(np.count_nonzero(mask)) for mask in masks)
    # tfmot counts steps from 1, so that a schedule which ends at step 0 never prunes: masks that tfmot itself would not
    # make, in groups, in blocks of images or ranked over all layers, stay as they are.
    schedule = load_tfmot().ConstantSparsity(min(zeros, size - 1) / size, begin_step=0, end_step=0, frequency=1)
    return {"pruning_schedule": schedule, **block_settings(weights, wrapping.pattern, wrapping.pool)}


def _settings_of_layer(layer: Any, weights: Mapping[str, Any], wrapping: WrapperSpec) -> WrapperSettings | None:
    """The settings of the wrapper of a layer, with the schedule that all of its weights share."""
    if isinstance(wrapping.pattern, BlockPattern) and any(
        len(weight.shape) != MATRIX_RANK for weight in weights.values()
    ):
        return None
    schedules = {wrapping.schedules[name] for name in weights}
    if len(weights) != len(layer.get_prunable_weights()) or len(schedules) != 1:
        raise UsageError(
            f"tfmot prunes all weights of {layer.name} with one schedule, to one sparsity",
            hint=f"select all or no weights of {layer.name}, with the same --layer ratio, or leave out --schedule",
        )
    # Imported here, as the module imports tfmot, and errors in a file are raised before that.
    from prunectl.training.tfmot.schedules import to_tfmot_schedule  # noqa: PLC0415

    return {
        "pruning_schedule": to_tfmot_schedule(schedules.pop()),
        **block_settings(weights, wrapping.pattern, wrapping.pool),
    }


def block_settings(weights: Mapping[str, Any], pattern: object, pool: Pooling) -> WrapperSettings:
    """The settings of a wrapper for blocks of matrices; empty for other patterns and weights of other ranks."""
    if not isinstance(pattern, BlockPattern) or any(len(weight.shape) != MATRIX_RANK for weight in weights.values()):
        return {}
    return {"block_size": (pattern.rows, pattern.columns), "block_pooling_type": pool.value.upper()}


def _compile(loaded: LoadedModel, wrapped: WrappedModel) -> None:
    """Compile the wrapped model with the training configuration of the file, unless it is missing or unknown."""
    parts = read_training_config(loaded.file)
    if "optimizer" not in parts or "loss" not in parts:
        return
    config = {"metrics": None, "weighted_metrics": None, "loss_weights": None, **parts}
    optimizer = config.pop("optimizer")
    config["optimizer_config"] = {"class_name": optimizer, "config": {}} if isinstance(optimizer, str) else optimizer
    try:
        loaded.check_trusted(parts)
        with ignore_warnings():
            options = compile_arguments(config, loaded.objects)
            if isinstance(parts["loss"], str):
                # Kept as a name, so that it is saved as a name, not as a function.
                options["loss"] = parts["loss"]
            wrapped.model.compile(**options)
    except (ValueError, TypeError, AttributeError, KeyError):
        # A user's own loss or metric, which must be given again for further training anyway.
        return


def _rename_masks(wrapped: WrappedModel) -> None:
    """Give the masks of a layer with several weights different names, which HDF5 needs."""
    for wrapper in wrapped.wrappers:
        for index, (_, mask, threshold) in enumerate(wrapper.pruning_vars[1:], 1):
            for variable in (mask, threshold):
                # Renamed afterwards, as tfmot itself makes the variables.
                rename(variable, variable.name.replace(":", f"_{index}:"))


def _save(model: Any, weight_layout: WeightLayout, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".wrapped-") as folder, ignore_warnings():
        # Keras chooses the format by the suffix, and the user's path may have another.
        path = Path(folder) / (weight_layout.value or "model")
        model.save(str(path), **({"save_format": "tf"} if weight_layout is WeightLayout.SAVED_MODEL else {}))
        os.replace(path, target)
