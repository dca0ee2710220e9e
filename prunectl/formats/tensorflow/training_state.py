"""What of a bundle only training needs, and which part of the training that is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prunectl.formats.base import Role
from prunectl.formats.stripping import Part
from prunectl.formats.tensorflow import bundle_tensors
from prunectl.formats.tensorflow.bundle import Bundle
from prunectl.formats.tensorflow.bundle_index import Entry
from prunectl.formats.tensorflow.object_graph import ObjectGraph
from prunectl.formats.tensorflow.optimizers import ownership
from prunectl.formats.tensorflow.slice_keys import slice_key
from prunectl.formats.tensorflow.variable_names import METRICS, VALUE_SUFFIX, without_optimizer

_KEPT = frozenset({"save_counter"})
"""`tf.train.Checkpoint` looks for it."""


def training_state(bundle: Bundle, graph: ObjectGraph) -> dict[bytes, Part]:
    """Return the entries that only training needs; whatever else might be a weight is not among them."""
    found = _owned(bundle, graph) if graph.nodes else _named(bundle, graph)
    for key in bundle.entries:
        if key.startswith(METRICS.encode()):
            found[key] = Part.TRAINING
    return found


def pieces(bundle: Bundle, keys: Iterable[bytes]) -> frozenset[bytes]:
    """Return the entries that hold the numbers: for one in slices, the slices."""
    entries = [bundle.entries[key] for key in keys]
    whole = {entry.key for entry in entries if not entry.slices}
    return frozenset(whole | {slice_key(entry.key, bounds) for entry in entries for bounds in entry.slices})


def _owned(bundle: Bundle, graph: ObjectGraph) -> dict[bytes, Part]:
    """Return what optimizers own, as the graph of objects tells."""
    keys = frozenset(key.encode() for key in ownership(graph).keys(graph))
    return {key: Part.OPTIMIZER for key in bundle.entries if key in keys}


def _named(bundle: Bundle, graph: ObjectGraph) -> dict[bytes, Part]:
    """Return what is called like the state of an optimizer, if it is a number or there is a weight that it is for."""
    roles = {tensor.name: tensor.role for tensor in bundle_tensors.tensors_of(bundle, graph, {})}
    entries = {
        entry.key.decode("utf-8", "backslashreplace").removesuffix(VALUE_SUFFIX): entry for entry in bundle.numbers()
    }
    weights = {name: entry for name, entry in entries.items() if roles.get(name) is not Role.OPTIMIZER}
    return {
        entry.key: Part.OPTIMIZER
        for name, entry in entries.items()
        if name not in weights and name.rpartition("/")[2] not in _KEPT and _is_state(name, entry, entries, weights)
    }


def _is_state(name: str, entry: Entry, entries: Mapping[str, Entry], weights: Mapping[str, Entry]) -> bool:
    """Whether it is a number, or its name is that of a weight of its shape with something behind or around it."""
    parent = entries.get(name.rpartition("/")[0])
    if not entry.shape or (parent is not None and parent.shape == entry.shape):
        return True
    parts = without_optimizer(name).split("/")
    inner = ("/".join(parts[begin:end]) for begin in range(len(parts)) for end in range(begin + 1, len(parts) + 1))
    return any(weights[part].shape == entry.shape for part in inner if part in weights)
