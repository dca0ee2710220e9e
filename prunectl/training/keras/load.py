"""Loads a model in the Keras version that wrote it, or builds it with the user's function."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import h5py

from prunectl.errors import InputError, PrunectlError, UsageError
from prunectl.formats import trust
from prunectl.formats.base import Family, ModelFile
from prunectl.formats.keras.numbering import renumber
from prunectl.formats.scratch import temporary_folder, utf8_path
from prunectl.training import user_code
from prunectl.training.backend import LoadOptions
from prunectl.training.host import before_seeding
from prunectl.training.keras._compat import application_classes
from prunectl.training.keras.backend import DevicePlacement, KerasLibrary, load_keras2, load_keras3
from prunectl.training.quiet import ignore_warnings
from prunectl.training.user_code import call_builder, resolve_builder


class WeightLayout(StrEnum):
    """How a file lays out its weights; the value is a file name by which Keras recognises the layout."""

    ARCHIVE = "model.keras"
    MODEL_H5 = "model.h5"
    """HDF5 with a whole model, whose weights are named by layer."""
    NAMED_WEIGHTS = "weights.h5"
    """HDF5 with weights only, named by layer."""
    NUMBERED_WEIGHTS = "model.weights.h5"
    """HDF5 with weights only, numbered within attributes."""
    SAVED_MODEL = ""
    """A SavedModel."""


def detect_layout(model: ModelFile) -> WeightLayout:
    """The layout of a file."""
    if model.family is Family.SAVED_MODEL:
        return WeightLayout.SAVED_MODEL
    if model.format == "keras":
        return WeightLayout.ARCHIVE
    if model.format != "keras-h5":
        raise InputError(f"{model.path} is not a Keras model")
    if model.about.keras is not None:
        return WeightLayout.MODEL_H5
    return WeightLayout.NAMED_WEIGHTS if _is_named(model) else WeightLayout.NUMBERED_WEIGHTS


def link_with_suffix(path: Path, weight_layout: WeightLayout, folder: Path, *, is_old: bool) -> Path:
    """A symbolic link to a file, named so that Keras recognises its layout.

    An archive of Keras 2 is copied instead if its layers lie in other folders than Keras expects today.
    """
    if weight_layout is WeightLayout.SAVED_MODEL:
        return utf8_path(path, folder / "link")
    link = folder / weight_layout.value
    if not link.exists() and not (is_old and weight_layout is WeightLayout.ARCHIVE and renumber(path, link)):
        os.symlink(path.resolve(), link)
    return link


def _is_named(model: ModelFile) -> bool:
    with h5py.File(model.path, "r", locking=False) as file:
        return any(key in file.attrs for key in ("layer_names", "layer_names0"))


_KERAS3 = 3
"""The major version from which the package is keras, not tf_keras, and archives number layers as Keras does today."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A loaded Keras model, and how to load its weights from another file of the same layout."""

    model: Any
    library: KerasLibrary
    file: ModelFile
    objects: Mapping[str, Any]
    """Custom objects by name."""
    load_weights: Callable[[Path], None]
    has_config: bool
    """Whether the model was built from the configuration in the file rather than by code."""
    is_trusted: bool = False

    def check_trusted(self, entry: Any) -> None:
        """Refuse a training configuration that refers to untrusted code; ValueError, as Keras has for unknown names."""
        facts = () if self.is_trusted else trust.unknown(trust.facts_in(entry), self.objects)
        if facts:
            raise ValueError(facts[0].words)


def load(file: ModelFile, origin: LoadOptions, placement: DevicePlacement) -> LoadedModel:
    """Load the model of a file under a device placement."""
    if origin.custom_objects and not origin.model:
        # Before the user's code, which imports it too, but lets it print.
        _library_of_file(file)
    user_code.check(file, origin)
    weight_layout = detect_layout(file)
    user_code.require_network(file, origin)
    if not origin.model and file.about.keras is None:
        raise InputError(
            f"{file.path} does not describe its Keras layers",
            hint="name the function that builds the model: --builder my_module:build",
        )
    library = _library_of_code(file) if origin.model else _library_of_file(file)
    objects = user_code.custom_objects(origin)
    build = resolve_builder(origin.model) if origin.model else None
    if build is None:
        _check_versions(objects, library, file, origin)
    # Layers draw random numbers while they are built, before a run seeds.
    before_seeding(*library.generators)
    with placement.scope(library), ignore_warnings():
        model = (
            _from_file(library, file, weight_layout, origin, objects)
            if build is None
            else call_builder(build, origin.model)
        )
    if build is not None:
        library = _library_of_model(model, origin.model)
        _check_built(model, origin.model)
    fill = _weight_loader(model, weight_layout, is_old=_keras_version(file) < _KERAS3)
    if build is not None:
        with placement.scope(library), ignore_warnings():
            fill(file.path)
    return LoadedModel(model, library, file, objects, fill, build is None, origin.is_trusted)


def _library_of_file(file: ModelFile) -> KerasLibrary:
    return load_keras3() if _keras_version(file) >= _KERAS3 else load_keras2()


def _library_of_code(file: ModelFile) -> KerasLibrary:
    """The presumed Keras version of a builder, before its model shows which one it is."""
    return load_keras2() if _keras_version(file) in {1, 2} else load_keras3()


def _keras_version(file: ModelFile) -> int:
    match = re.search(r"keras (\d+)", file.about.producer)
    return int(match[1]) if match else 0


def _check_versions(objects: Mapping[str, Any], library: KerasLibrary, file: ModelFile, origin: LoadOptions) -> None:
    """Refuse layers of the other Keras version that the file names: Keras fails with them in ways that hide why."""
    name, other = ("Keras 2", "keras") if library.is_keras2 else ("Keras 3", "tf_keras")
    config = json.dumps(file.about.keras, ensure_ascii=False)
    for key, kind in objects.items():
        is_named = re.search(rf'[">]{re.escape(key.rpartition(">")[2])}"', config) is not None
        if is_named and isinstance(kind, type) and hasattr(kind, "call") and _package_of(kind) == other:
            where = "tf_keras, or set TF_USE_LEGACY_KERAS=1" if library.is_keras2 else "keras"
            raise UsageError(
                f"{file.path} is a file of {name}, but {key} in --custom-objects {origin.custom_objects} derives from "
                f"{other}",
                hint=f"import layers from {where}",
            )


def _package_of(kind: type) -> str:
    """The package of Keras, keras or tf_keras, that a class derives from; empty if from none."""
    packages = (base.__module__.partition(".")[0] for base in kind.__mro__)
    return next((package for package in packages if package in {"keras", "tf_keras"}), "")


def _library_of_model(model: Any, reference: str) -> KerasLibrary:
    match _package_of(type(model)):
        case "tf_keras":
            return load_keras2()
        case "keras":
            return load_keras3()
    raise UsageError(
        f"--builder {reference} returned a value of type {type(model).__module__}.{type(model).__name__}",
        hint="it must return a keras or tf_keras model",
    )


def _check_built(model: Any, reference: str) -> None:
    if not model.built or not model.weights:
        raise UsageError(
            f"--builder {reference} returned a model without weights",
            hint="start the model with an Input, or call build() with its input shape",
        )


def _from_file(
    library: KerasLibrary, file: ModelFile, weight_layout: WeightLayout, origin: LoadOptions, objects: Mapping[str, Any]
) -> Any:
    known = dict(objects)
    if library.is_keras2 and weight_layout is WeightLayout.ARCHIVE and not origin.is_trusted:
        # An archive names the module of each class, all trusted by now; in HDF5 a name may mean a user's class.
        known = application_classes() | known
    options: dict[str, Any] = {"compile": False, "custom_objects": known}
    if weight_layout is not WeightLayout.SAVED_MODEL:
        options["safe_mode"] = not origin.is_trusted
    with temporary_folder() as scratch:
        path = link_with_suffix(file.path, weight_layout, scratch, is_old=_keras_version(file) < _KERAS3)
        try:
            return library.keras.models.load_model(str(path), **options)
        except PrunectlError:
            raise
        except Exception as error:
            raise InputError(
                f"Keras {library.keras.__version__} cannot rebuild {file.path}: {error_line(error)}",
                hint=f"provide custom layers with --custom-objects mod:DICT{trust.OR_BUILD}",
            ) from error


def _weight_loader(model: Any, weight_layout: WeightLayout, *, is_old: bool) -> Callable[[Path], None]:
    def fill(path: Path) -> None:
        with temporary_folder() as folder:
            readable = link_with_suffix(path, weight_layout, folder, is_old=is_old)
            if weight_layout is WeightLayout.SAVED_MODEL:
                status = model.load_weights(str(readable / "variables" / "variables"))
                status.expect_partial()
                return
            try:
                model.load_weights(str(readable))
            except (ValueError, KeyError, OSError) as error:
                raise InputError(f"{path} does not fit the model: {error_line(error)}") from error

    return fill


def error_line(error: Exception) -> str:
    """The message of an error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # TensorFlow's messages begin with the place in its code, before the actual error.
    messages = [match[1] for line in lines if (match := re.match(r"\w+Error: (.+)", line))]
    return (messages or lines or [type(error).__name__])[0].rstrip(".:")[:300]
