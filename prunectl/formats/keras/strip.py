"""Strip Keras files of optimizer state, training configuration, masks and pruning wrappers."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats.base import WRAPPING, ModelFile, RemovedItem, StripOptions, StripPart
from prunectl.formats.keras import strip_layouts
from prunectl.formats.keras.archive import WEIGHTS, inflate
from prunectl.formats.keras.hdf5 import read, rewrite
from prunectl.formats.keras.hdf5.child import H5Location
from prunectl.formats.keras.hdf5.read import H5Contents
from prunectl.formats.keras.hdf5.rewrite import H5Edits, merge
from prunectl.formats.keras.layouts import layer_names_group
from prunectl.formats.keras.strip_layouts import UnmatchedMaskError
from prunectl.formats.keras.unwrap import LayerNameConflictError, Unwrapped, unwrap_config
from prunectl.formats.zip_read import open_archive
from prunectl.formats.zip_write import Content, file_content, rewrite_zip


@dataclass(frozen=True, slots=True)
class StripPlan:
    """Changes of the weights, and the new configuration."""

    edits: H5Edits
    config: Any
    removed: tuple[RemovedItem, ...] = ()
    """Removed from the configuration."""


def plan_strip(contents: H5Contents, config: Mapping[str, Any] | None, options: StripOptions, shown: Path) -> StripPlan:
    """The changes that strip options mean for a file; ``shown`` is what the user calls it."""
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
        raise InputError(f"{shown} has two layers named {error} once its wrappers are gone") from error
    except (UnmatchedMaskError, strip_layouts.UnknownWrappedLayerError, strip_layouts.MissingWeightError) as error:
        hint = "the rest can go: prunectl strip --only optimizer,training"
        raise InputError(f"{shown} cannot have its masks applied: {error}", hint=hint) from error
    except RecursionError as error:
        raise InputError(f"{shown} is refused: its configuration is nested too deep") from error
    return StripPlan(edits, stripped_config, (*wrappers, *uncompiled))


def _uncompiled(config: Any) -> tuple[Any, tuple[RemovedItem, ...]]:
    """The configuration as of a model that was never compiled, nor any model in it."""
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
    """Write the file without the parts in the options; returns the removed items."""
    contents = read.read_contents(H5Location(model.path, 0, model.path.stat().st_size))
    plan = plan_strip(contents, model.about.keras, options, model.path)
    edits = plan.edits
    if plan.removed:
        edits = merge([edits, H5Edits(attributes={("", "model_config"): json.dumps(plan.config)})])
    rewrite.edit(model.path, targets[model.path], edits, contents, model.path)
    return (*edits.removed, *plan.removed)


_CONFIG = "config.json"


def strip_archive(model: ModelFile, options: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write the archive without the parts in the options; returns the removed items."""
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
