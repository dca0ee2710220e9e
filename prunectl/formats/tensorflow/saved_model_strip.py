"""A SavedModel folder without what a trained model does not need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile
from prunectl.formats.stripping import Part, Removed, Wish
from prunectl.formats.tensorflow import keras_metadata_write, object_graph, removals, saved_model_unwrap
from prunectl.formats.tensorflow.bundle import Bundle, read_bundle
from prunectl.formats.tensorflow.bundle_index import Entry
from prunectl.formats.tensorflow.bundle_rewrite import Changes, rewrite
from prunectl.formats.tensorflow.saved_model_graph import read_graph
from prunectl.formats.tensorflow.signature_reads import variables_read
from prunectl.formats.tensorflow.training_state import pieces, training_state
from prunectl.formats.writing import write_flat


def strip(model: ModelFile, wish: Wish, targets: dict[Path, Path]) -> tuple[Removed, ...]:
    """Write the folder without what the wish names, and return what went."""
    if wish.is_half:
        raise UsageError(
            f"{model.path} cannot hold 16-bit floats: its graph says the type of every variable",
            hint="leave out --half",
        )
    if wish.parts & saved_model_unwrap.WRAPPING and model.about.wrappers:
        return saved_model_unwrap.unwrap(model, wish, targets)
    left = dict(targets)
    removed: list[Removed] = []
    if Part.TRAINING in wish.parts:
        changed, gone = keras_metadata_write.training_in(model.path)
        for path, content in changed.items():
            left.pop(path).write_bytes(content)
        removed += gone
    index = model.path / "variables" / "variables.index"
    if index.is_file():
        bundle = read_bundle(index)
        dead = {key: part for key, part in _resettable(model, bundle).items() if part in wish.parts}
        gone = removals.emptied(bundle, dead)
        # Resetting what is alone would gain nothing.
        if any(thing.bytes for thing in gone):
            owned = {index, *bundle.shards.values()}
            rewrite(bundle, Changes(zeros=pieces(bundle, dead)), {path: left.pop(path) for path in owned})
            removed += gone
    write_flat(model, left, ())
    return tuple(removed)


def _resettable(model: ModelFile, bundle: Bundle) -> Mapping[bytes, Part]:
    """Return what training only needs and may start from zero: not the rates and factors of an optimizer.

    The graph asks for every variable by its name, also when it is only served: none of them can be missing.
    """
    graph = object_graph.read(bundle)
    numbers = {entry.key for entry in bundle.numbers()}
    done = bundle.shared.keys() | {entry.key for entry in bundle.shared.values()}
    names = graph.full_names
    # A signature may train, or what is called an optimizer may be a part of the model.
    read = variables_read(read_graph(model.path / "saved_model.pb")) if graph.nodes else frozenset()
    return {
        key: part
        for key, part in training_state(bundle, graph).items()
        if key in numbers
        and not pieces(bundle, [key]) <= done
        and _starts_at_zero(bundle.entries[key])
        and names.get(key.decode("utf-8", "backslashreplace"), "") not in read
    }


def _starts_at_zero(entry: Entry) -> bool:
    return bool(entry.shape) or entry.dtype.kind == "i"
