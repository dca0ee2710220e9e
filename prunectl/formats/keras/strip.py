"""Strip Keras files of optimizer state, training configuration, masks and the pruning wrappers of tfmot."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats.base import WRAPPING, ModelFile, RemovedItem, StripOptions, StripPart
from prunectl.formats.keras import hdf5, strip_layouts
from prunectl.formats.keras.config import WRAPPER, inner_layer, object_in, string_in
from prunectl.formats.keras.hdf5 import H5Contents, H5Location, rewrite
from prunectl.formats.keras.hdf5.rewrite import H5Edits, merge
from prunectl.formats.keras.layouts import layer_names_group
from prunectl.formats.keras.model import WEIGHTS, inflate
from prunectl.formats.keras.wrapped import MasksNotAppliedError
from prunectl.formats.zip_read import open_archive
from prunectl.formats.zip_write import Content, file_content, rewrite_zip


@dataclass(frozen=True, slots=True)
class StripPlan:
    """The edits of the weights, and the new configuration."""

    edits: H5Edits
    config: Any
    removed: tuple[RemovedItem, ...] = ()
    """Items removed from the configuration."""


def plan_strip(contents: H5Contents, config: Mapping[str, Any] | None, options: StripOptions, shown: Path) -> StripPlan:
    """Plan the changes of a file for some strip options; ``shown`` is the path that errors name."""
    is_unwrapped = bool(options.parts & WRAPPING)
    root = layer_names_group(contents)
    try:
        plain = unwrap_config(config) if is_unwrapped else Unwrapped(config, {})
        wrappers = tuple(RemovedItem(name, StripPart.WRAPPERS, nbytes) for name, nbytes in plain.wrappers.items())
        stripped_config, uncompiled = (
            _uncompiled(plain.config) if StripPart.TRAINING in options.parts else (plain.config, ())
        )
        if root is not None:
            edits = strip_layouts.plan_by_layer_name(contents, root, options, is_unwrapped=is_unwrapped)
        else:
            edits = strip_layouts.plan_by_path(contents, config, options, is_unwrapped=is_unwrapped)
    except LayerNameConflictError as error:
        raise InputError(f"{shown} would have two layers named {error} without its wrappers") from error
    except MasksNotAppliedError as error:
        hint = "strip the other parts only: add --only optimizer,training"
        raise InputError(f"the masks of {shown} cannot be applied: {error}", hint=hint) from error
    except RecursionError as error:
        raise InputError(f"{shown} is refused: its configuration is nested too deep") from error
    return StripPlan(edits, stripped_config, (*wrappers, *uncompiled))


def _uncompiled(config: Any) -> tuple[Any, tuple[RemovedItem, ...]]:
    """The configuration without the `compile_config` of the model and of the models in it, and what was removed."""
    removed: list[RemovedItem] = []

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.get("class_name") and value.get("compile_config"):
            removed.append(RemovedItem("compile_config", StripPart.TRAINING, len(json.dumps(value["compile_config"]))))
            value = {key: stripped for key, stripped in value.items() if key != "compile_config"}
        return {key: plain(stripped) for key, stripped in value.items()}

    stripped = plain(config)
    return stripped, tuple(removed)


def strip_h5(model: ModelFile, options: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write the file without the parts in the options, and return the removed items."""
    contents = hdf5.read_contents(H5Location(model.path, 0, model.path.stat().st_size))
    plan = plan_strip(contents, model.about.keras, options, model.path)
    edits = plan.edits
    if plan.removed:
        edits = merge([edits, H5Edits(attributes={("", "model_config"): json.dumps(plan.config)})])
    rewrite.edit(model.path, targets[model.path], edits, contents, model.path)
    return (*edits.removed, *plan.removed)


_CONFIG = "config.json"


def strip_archive(model: ModelFile, options: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write the archive without the parts in the options, and return the removed items."""
    archive, target = open_archive(model.path), targets[model.path]
    with tempfile.TemporaryDirectory(prefix=".weights-", dir=target.parent) as scratch:
        weights, edited = Path(scratch) / WEIGHTS, Path(scratch) / "edited.h5"
        contents = inflate(archive, weights)
        plan = plan_strip(contents, model.about.keras, options, model.path)
        changed: dict[str, Content] = {}
        if not plan.edits.is_empty:
            rewrite.edit(weights, edited, plan.edits, contents, model.path)
            changed[WEIGHTS] = file_content(edited)
        if plan.removed:
            config = json.dumps(plan.config).encode()
            changed[_CONFIG] = len(config), (config,)
        if changed:
            rewrite_zip(archive, target, changed, force_zip64=True)
        else:
            shutil.copyfile(archive.path, target)
    return (*plan.edits.removed, *plan.removed)


_REFERENCE_KEYS = frozenset({"inbound_nodes", "input_layers", "output_layers"})
_INPUT_KEYS = ("batch_input_shape", "batch_shape")
"""Settings of a model's first layer with the shape of its input; if the layer is wrapped, its wrapper has them."""


@dataclass(frozen=True, slots=True)
class Unwrapped:
    """An unwrapped configuration, and the wrappers removed from it."""

    config: Any
    wrappers: Mapping[str, int]
    """The names of the wrappers, each with the bytes of JSON that it took."""


class LayerNameConflictError(Exception):
    """A wrapped layer cannot have its name back, since another layer has it."""


def unwrap_config(config: Any) -> Unwrapped:
    """A configuration with every wrapped layer in the place of its wrapper."""
    wrappers: dict[str, int] = {}
    return Unwrapped(_plain(config, {}, wrappers), wrappers)


def _plain(value: Any, names: Mapping[str, str], wrappers: dict[str, int]) -> Any:
    if isinstance(value, list):
        return [_plain(item, names, wrappers) for item in value]
    if not isinstance(value, dict):
        return value
    inner = inner_layer(value)
    if inner is not None:
        layer = _in_place_of(value, inner)
        wrappers[string_in(value["config"], "name") or WRAPPER] = len(json.dumps(value)) - len(json.dumps(layer))
        return _plain(layer, names, wrappers)
    if isinstance(value.get("layers"), list):
        names = _new_names(value["layers"])
    return {
        key: _with_new_names(member, names) if key in _REFERENCE_KEYS else _plain(member, names, wrappers)
        for key, member in value.items()
    }


def _in_place_of(wrapper: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    """A wrapped layer with its wrapper's calls and input shape, in its wrapper's format."""
    wrapper_config = object_in(wrapper, "config")
    moved = {key: wrapper_config[key] for key in _INPUT_KEYS if key in wrapper_config}
    # Old formats have fewer keys for a layer, and loaders recognise a format by them.
    layer = {key: value for key, value in inner.items() if key in wrapper or key in {"class_name", "config"}}
    if "registered_name" not in wrapper:
        # Old formats have the full name of a registered class in `class_name`, newer ones in `registered_name`.
        layer["class_name"] = string_in(inner, "registered_name") or layer["class_name"]
    layer["config"] = {**moved, **object_in(inner, "config")}
    rest = {
        key: value for key, value in wrapper.items() if key not in layer and key not in {"module", "registered_name"}
    }
    if "name" in rest:
        rest["name"] = _name(inner)
    return {**layer, **rest}


def _new_names(layers: list[Any]) -> dict[str, str]:
    """The names of the wrapped layers of a model, by the names of their wrappers."""
    inner = {_name(layer): inner_layer(layer) for layer in layers}
    names = {name: _name(layer) for name, layer in inner.items() if layer is not None}
    counts = Counter(names.values())
    for wrapper, name in names.items():
        # A wrapped layer may have the name of its own wrapper, but not of another layer.
        if (name in inner and name != wrapper) or counts[name] > 1:
            raise LayerNameConflictError(name)
    return names


def _with_new_names(value: Any, names: Mapping[str, str]) -> Any:
    """The references of a model to its layers, such as `["dense", 0, 0, {}]`, with their new names."""
    if isinstance(value, dict):
        return {
            key: [names.get(member[0], member[0]), *member[1:]]
            if _is_history(key, member)
            else _with_new_names(member, names)
            for key, member in value.items()
        }
    if not isinstance(value, list):
        return value
    if len(value) >= 3 and isinstance(value[0], str) and type(value[1]) is int and type(value[2]) is int:
        return [names.get(value[0], value[0]), *(_with_new_names(item, names) for item in value[1:])]
    return [_with_new_names(item, names) for item in value]


def _is_history(key: str, value: Any) -> bool:
    return key == "keras_history" and isinstance(value, list) and bool(value) and isinstance(value[0], str)


def _name(layer: Any) -> str:
    return string_in(object_in(layer, "config"), "name") or string_in(layer, "name")
