"""May a model be opened by its framework? Its code does not run unless the user says so."""

from __future__ import annotations

from prunectl.formats import trust
from prunectl.formats.base import ModelFile
from prunectl.training import custom
from prunectl.training.network import Origin

_LOOKED_AT = frozenset({"keras", "keras-h5", "saved-model"})


def check(model: ModelFile, origin: Origin) -> None:
    """Refuse a Keras or TensorFlow file that brings code, or names code that nobody vouched for.

    Asked before a framework is imported. Where the user's own function builds the model, nothing in the file is looked
    at but numbers.
    """
    if model.format in _LOOKED_AT and not origin.is_trusted and not origin.model:
        trust.check(model, lambda: custom.objects(origin))
