"""A SavedModel folder without what a trained model does not need."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prunectl.errors import UsageError
from prunectl.formats.base import ModelFile, RemovedItem, StripOptions, StripPart
from prunectl.formats.patch import patch_files
from prunectl.formats.tensorflow import object_graph, unwrap
from prunectl.formats.tensorflow.bundle import Bundle, BundleEntry, read_bundle
from prunectl.formats.tensorflow.bundle_write import BundleEdits, rewrite_bundle
from prunectl.formats.tensorflow.graph_def import read_graph, variables_read
from prunectl.formats.tensorflow.unwrap import pieces, training_state


def strip(model: ModelFile, wish: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write the folder without what the wish names, and return what went."""
    if wish.to_half:
        raise UsageError(
            f"{model.path} cannot hold 16-bit floats: its graph says the type of every variable",
            hint="leave out --half",
        )
    if wish.parts & unwrap.WRAPPING and model.about.wrappers:
        return unwrap.unwrap(model, wish, targets)
    left = dict(targets)
    removed: list[RemovedItem] = []
    if StripPart.TRAINING in wish.parts:
        changed, gone = unwrap.training_in(model.path)
        for path, content in changed.items():
            left.pop(path).write_bytes(content)
        removed += gone
    index = model.path / "variables" / "variables.index"
    if index.is_file():
        bundle = read_bundle(index)
        dead = {key: part for key, part in _resettable(model, bundle).items() if part in wish.parts}
        gone = unwrap.zeroed_items(bundle, dead)
        # Resetting what is alone would gain nothing.
        if any(thing.bytes for thing in gone):
            owned = {index, *bundle.shards.values()}
            rewrite_bundle(bundle, BundleEdits(zeros=pieces(bundle, dead)), {path: left.pop(path) for path in owned})
            removed += gone
    patch_files(model, left, ())
    return tuple(removed)


def _resettable(model: ModelFile, bundle: Bundle) -> Mapping[bytes, StripPart]:
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


def _starts_at_zero(entry: BundleEntry) -> bool:
    return bool(entry.shape) or entry.dtype.kind == "i"
