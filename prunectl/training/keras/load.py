"""A model, loaded by the Keras that wrote it."""

from __future__ import annotations

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
from prunectl.formats.base import ModelFile
from prunectl.formats.keras.archive import renumber
from prunectl.formats.scratch import temporary_folder
from prunectl.training import user_code
from prunectl.training.backend import ModelOrigin
from prunectl.training.keras.backend import Library, keras_three, keras_two, quietly
from prunectl.training.keras.distribution import DevicePlacement
from prunectl.training.user_code import builder, built


class WeightLayout(StrEnum):
    """A way of laying weights out, with the name of a file that Keras recognises it by."""

    ARCHIVE = "model.keras"
    WHOLE = "model.h5"
    """A whole model, its weights named by layer."""
    NAMED = "weights.h5"
    """Weights alone, named by layer."""
    NUMBERED = "model.weights.h5"
    """Weights alone, numbered by attribute."""
    FOLDER = ""
    """A SavedModel."""


def layout(model: ModelFile) -> WeightLayout:
    """How a file is laid out."""
    if model.format == "saved-model":
        return WeightLayout.FOLDER
    if model.format == "keras":
        return WeightLayout.ARCHIVE
    if model.format != "keras-h5":
        raise InputError(f"{model.path} is no Keras model")
    if model.about.keras is not None:
        return WeightLayout.WHOLE
    return WeightLayout.NAMED if _is_named(model) else WeightLayout.NUMBERED


def linked(path: Path, kind: WeightLayout, folder: Path, *, is_old: bool) -> Path:
    """A path to a file under the name by which Keras recognises it.

    An old archive, of Keras 2, is copied where its layers lie in other folders than those where Keras looks now.
    """
    if kind is WeightLayout.FOLDER:
        return path
    link = folder / kind.value
    if not link.exists() and not (is_old and kind is WeightLayout.ARCHIVE and renumber(path, link)):
        os.symlink(path.resolve(), link)
    return link


def _is_named(model: ModelFile) -> bool:
    with h5py.File(model.path, "r", locking=False) as file:
        return any(key in file.attrs for key in ("layer_names", "layer_names0"))


_THREE = 3
"""The version that numbers the layers of an archive as Keras does now, and of another library."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A Keras model, and how to fill it from a file that is laid out like its own."""

    model: Any
    library: Library
    file: ModelFile
    objects: Mapping[str, Any]
    """What the names of custom objects mean."""
    fill: Callable[[Path], None]
    is_whole: bool
    """Whether the file itself says what the model is."""
    is_trusted: bool = False

    def vouch_for(self, entry: Any) -> None:
        """Refuse a part of how the file was trained that names code; ValueError, as Keras has it for unknown names."""
        facts = () if self.is_trusted else trust.unknown(trust.facts_in(entry), self.objects)
        if facts:
            raise ValueError(facts[0].words)


def load(file: ModelFile, origin: ModelOrigin, place: DevicePlacement) -> Loaded:
    """The model of a file, made in some place."""
    user_code.check(file, origin)
    objects = user_code.objects(origin)
    kind = layout(file)
    make = builder(origin.model) if origin.model else None
    if make is None and (kind in {WeightLayout.NAMED, WeightLayout.NUMBERED} or file.about.keras is None):
        raise _nothing_to_build(file, kind)
    library = _library_of_file(file) if make is None else _library_of_code(file)
    with place.scope(library), quietly():
        model = _from_file(library, file, kind, origin, objects) if make is None else built(make, origin.model)
    if make is not None:
        library = _library_of_model(model, origin.model)
        _check_built(model, origin.model)
    fill = _filler(model, kind, is_old=_keras_version(file) < _THREE)
    if make is not None:
        with place.scope(library), quietly():
            fill(file.path)
    return Loaded(model, library, file, objects, fill, make is None, origin.is_trusted)


def _nothing_to_build(file: ModelFile, kind: WeightLayout) -> PrunectlError:
    if kind is WeightLayout.FOLDER:
        return InputError(
            f"{file.path} does not say which Keras layers it consists of",
            hint="say what builds the model: --model my_module:build",
        )
    return UsageError(
        f"{file.path} holds weights alone, no model", hint="say what builds the model: --model my_module:build"
    )


def _library_of_file(file: ModelFile) -> Library:
    return keras_three() if _keras_version(file) >= _THREE else keras_two()


def _library_of_code(file: ModelFile) -> Library:
    """A first guess, made before the model is built."""
    return keras_two() if _keras_version(file) in {1, 2} else keras_three()


def _keras_version(file: ModelFile) -> int:
    found = re.search(r"keras (\d+)", file.about.producer)
    return int(found[1]) if found else 0


def _library_of_model(model: Any, reference: str) -> Library:
    for kind in type(model).__mro__:
        if kind.__module__.startswith("tf_keras."):
            return keras_two()
        if kind.__module__.startswith("keras."):
            return keras_three()
    raise UsageError(
        f"--model {reference} returned a {type(model).__module__}.{type(model).__name__}",
        hint="let it return a model of keras or tf_keras",
    )


def _check_built(model: Any, reference: str) -> None:
    if not model.built or not model.weights:
        raise UsageError(
            f"--model {reference} returned a model without weights",
            hint="begin it with an Input, or call build() with its input shape",
        )


def _from_file(
    library: Library, file: ModelFile, kind: WeightLayout, origin: ModelOrigin, objects: Mapping[str, Any]
) -> Any:
    words: dict[str, Any] = {"compile": False, "custom_objects": dict(objects)}
    if kind is not WeightLayout.FOLDER:
        words["safe_mode"] = not origin.is_trusted
    with temporary_folder() as scratch:
        place = linked(file.path, kind, scratch, is_old=_keras_version(file) < _THREE)
        try:
            return library.keras.models.load_model(str(place), **words)
        except PrunectlError:
            raise
        except Exception as error:
            raise InputError(
                f"{file.path} cannot be rebuilt by Keras {library.keras.__version__}: {first_line(error)}",
                hint="name what is custom with --custom-objects mod:DICT, or build the model with --model mod:fn",
            ) from error


def _filler(model: Any, kind: WeightLayout, *, is_old: bool) -> Callable[[Path], None]:
    def fill(path: Path) -> None:
        if kind is WeightLayout.FOLDER:
            status = model.load_weights(str(path / "variables" / "variables"))
            status.expect_partial()
            return
        with temporary_folder() as folder:
            try:
                model.load_weights(str(linked(path, kind, folder, is_old=is_old)))
            except (ValueError, KeyError, OSError) as error:
                raise InputError(f"{path} does not fit the model: {first_line(error)}") from error

    return fill


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # TensorFlow tells first where in its code it was, and then what happened.
    told = [found[1] for line in lines if (found := re.match(r"\w+Error: (.+)", line))]
    return (told or lines or [type(error).__name__])[0].rstrip(".:")[:300]
