"""What of a Keras file is to go, whichever way it is laid out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunectl.errors import InputError
from prunectl.formats.keras import leftovers_named, leftovers_numbered
from prunectl.formats.keras.edits import Edits
from prunectl.formats.keras.hdf5 import Contents
from prunectl.formats.keras.masked import NoWeightError
from prunectl.formats.keras.unwrapped import TwoLayersError, Unwrapped, unwrapped
from prunectl.formats.stripping import Part, Removed, Wish

WRAPPING = frozenset({Part.MASKS, Part.WRAPPERS})
"""Neither means anything without the other: they go together."""


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What is to change in the weights, and what the configuration becomes."""

    edits: Edits
    config: Any
    removed: tuple[Removed, ...] = ()
    """What goes from the configuration."""


def find(contents: Contents, config: Mapping[str, Any] | None, wish: Wish, shown: Path) -> Leftovers:
    """Return what a wish means for a file; ``shown`` is what the user calls it."""
    is_unwrapped = bool(wish.parts & WRAPPING)
    root = leftovers_named.root_of(contents)
    try:
        plain = unwrapped(config) if is_unwrapped else Unwrapped(config, {})
        gone = tuple(Removed(name, Part.WRAPPERS, nbytes) for name, nbytes in plain.wrappers.items())
        left, uncompiled = _uncompiled(plain.config) if Part.TRAINING in wish.parts else (plain.config, ())
        if root is not None:
            edits = leftovers_named.find(contents, root, wish, is_unwrapped=is_unwrapped)
        else:
            edits = leftovers_numbered.find(contents, config, wish, is_unwrapped=is_unwrapped)
    except TwoLayersError as error:
        raise InputError(f"{shown} has two layers named {error} once its wrappers are gone") from error
    except (NoWeightError, leftovers_numbered.UnknownLayerError, leftovers_named.IncompleteError) as error:
        hint = "the rest can go: prunectl strip --only optimizer,training"
        raise InputError(f"{shown} cannot have its masks applied: {error}", hint=hint) from error
    except RecursionError as error:
        raise InputError(f"{shown} is refused: its configuration is nested too deep") from error
    return Leftovers(edits, left, (*gone, *uncompiled))


def _uncompiled(config: Any) -> tuple[Any, tuple[Removed, ...]]:
    """Return the configuration as of a model that was never compiled, nor any model in it."""
    removed: list[Removed] = []

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.get("class_name") and value.get("compile_config"):
            removed.append(Removed("compile_config", Part.TRAINING, len(json.dumps(value["compile_config"]))))
            value = {key: found for key, found in value.items() if key != "compile_config"}
        return {key: plain(found) for key, found in value.items()}

    found = plain(config)
    return found, tuple(removed)
