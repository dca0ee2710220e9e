"""Strip a SavedModel folder of training configuration and optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prunectl.errors import UsageError
from prunectl.formats.base import WRAPPING, ModelFile, RemovedItem, StripOptions, StripPart
from prunectl.formats.patch import patch_files
from prunectl.formats.tensorflow import object_graph, unwrap
from prunectl.formats.tensorflow.bundle import Bundle, BundleEntry, read_bundle
from prunectl.formats.tensorflow.bundle_write import BundleEdits, rewrite_bundle
from prunectl.formats.tensorflow.graph_def import read_graph, variables_used_by_functions
from prunectl.formats.tensorflow.unwrap import storage_keys, training_state


def strip(model: ModelFile, options: StripOptions, targets: dict[Path, Path]) -> tuple[RemovedItem, ...]:
    """Write the folder without the parts in the options; returns the removed items."""
    if options.to_half:
        raise UsageError(
            f"{model.path} cannot hold 16-bit floats: its graph says the type of every variable",
            hint="leave out --half",
        )
    if options.parts & WRAPPING and model.about.wrappers:
        return unwrap.unwrap(model, options, targets)
    unwritten = dict(targets)
    removed: list[RemovedItem] = []
    if StripPart.TRAINING in options.parts:
        changed, items = unwrap.training_in(model.path)
        for path, content in changed.items():
            unwritten.pop(path).write_bytes(content)
        removed += items
    index = model.path / "variables" / "variables.index"
    if index.is_file():
        bundle = read_bundle(index)
        zeroed = {key: part for key, part in _zeroable_entries(model, bundle).items() if part in options.parts}
        items = unwrap.zeroed_items(bundle, zeroed)
        # Resetting what is alone would gain nothing.
        if any(item.bytes for item in items):
            owned = {index, *bundle.shards.values()}
            rewrite_bundle(
                bundle, BundleEdits(zeros=storage_keys(bundle, zeroed)), {path: unwritten.pop(path) for path in owned}
            )
            removed += items
    patch_files(model, unwritten, ())
    return tuple(removed)


def _zeroable_entries(model: ModelFile, bundle: Bundle) -> Mapping[bytes, StripPart]:
    """What training only needs and may start from zero: not the rates and factors of an optimizer.

    The graph asks for every variable by its name, also when it is only served: none of them can be missing.
    """
    graph = object_graph.read(bundle)
    numbers = {entry.key for entry in bundle.numbers()}
    zeroed_already = bundle.shared.keys() | {entry.key for entry in bundle.shared.values()}
    names = graph.full_names
    # A signature may train, or what is called an optimizer may be a part of the model.
    used = variables_used_by_functions(read_graph(model.path / "saved_model.pb")) if graph.nodes else frozenset()
    return {
        key: part
        for key, part in training_state(bundle, graph).items()
        if key in numbers
        and not storage_keys(bundle, [key]) <= zeroed_already
        and _starts_at_zero(bundle.entries[key])
        and names.get(key.decode("utf-8", "backslashreplace"), "") not in used
    }


def _starts_at_zero(entry: BundleEntry) -> bool:
    return bool(entry.shape) or entry.dtype.kind == "i"
