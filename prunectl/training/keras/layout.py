"""How a Keras file lays its weights out, which decides how Keras must be told to load it."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path

import h5py

from prunectl.errors import InputError
from prunectl.formats.base import ModelFile
from prunectl.formats.keras.archive_write import renumber


class Layout(StrEnum):
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


def layout(model: ModelFile) -> Layout:
    """Return how a file is laid out."""
    if model.format == "saved-model":
        return Layout.FOLDER
    if model.format == "keras":
        return Layout.ARCHIVE
    if model.format != "keras-h5":
        raise InputError(f"{model.path} is no Keras model")
    if model.about.keras is not None:
        return Layout.WHOLE
    return Layout.NAMED if _is_named(model) else Layout.NUMBERED


def linked(path: Path, kind: Layout, folder: Path, *, is_old: bool) -> Path:
    """Return a path to a file under the name by which Keras recognises it.

    An old archive, of Keras 2, is copied where its layers lie in other folders than those where Keras looks now.
    """
    if kind is Layout.FOLDER:
        return path
    link = folder / kind.value
    if not link.exists() and not (is_old and kind is Layout.ARCHIVE and renumber(path, link)):
        os.symlink(path.resolve(), link)
    return link


def _is_named(model: ModelFile) -> bool:
    with h5py.File(model.path, "r", locking=False) as file:
        return any(key in file.attrs for key in ("layer_names", "layer_names0"))
