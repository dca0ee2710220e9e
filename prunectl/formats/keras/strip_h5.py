"""An HDF5 file of Keras without what a trained model does not need."""

from __future__ import annotations

import json
from pathlib import Path

from prunectl.formats.base import ModelFile
from prunectl.formats.keras import h5_edit, hdf5, leftovers
from prunectl.formats.keras.edits import Edits, merged
from prunectl.formats.keras.hdf5_walk import Place
from prunectl.formats.stripping import Removed, Wish


def strip(model: ModelFile, wish: Wish, targets: dict[Path, Path]) -> tuple[Removed, ...]:
    """Write the file without what the wish names, and return what went."""
    contents = hdf5.read_contents(Place(model.path, 0, model.path.stat().st_size))
    found = leftovers.find(contents, model.about.keras, wish, model.path)
    edits = found.edits
    if found.removed:
        edits = merged([edits, Edits(attributes={("", "model_config"): json.dumps(found.config)})])
    h5_edit.edit(model.path, targets[model.path], edits, contents, model.path)
    return (*edits.removed, *found.removed)
