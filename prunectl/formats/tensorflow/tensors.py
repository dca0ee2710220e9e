"""The variables in a TensorFlow bundle, as tensors with names, layers and roles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from prunectl.formats.base import Array, NameAllocator, Storage, Tensor
from prunectl.formats.extents import view
from prunectl.formats.tensorflow import variable_names
from prunectl.formats.tensorflow.bundle import Bundle, BundleEntry
from prunectl.formats.tensorflow.object_graph import ObjectGraph, find_ownership
from prunectl.formats.tensorflow.variable_names import VALUE_SUFFIX

_EXPORT_LISTS = ("_all_variables/", "_operations/")
"""Keras 3 lists the variables of an exported model under one of these, and once more under `variables/`."""


def tensors_of(bundle: Bundle, graph: ObjectGraph, classes: Mapping[str, str]) -> tuple[Tensor, ...]:
    """The variables of a bundle, in the order of its index."""
    entries = bundle.numbers()
    full_names, ownership = graph.full_names, find_ownership(graph)
    state = ownership.keys(graph)
    root = _root(entries, full_names)
    allocator = NameAllocator()
    variables = []
    for entry in entries:
        key = entry.key.decode("utf-8", "backslashreplace")
        name = key.removesuffix(VALUE_SUFFIX)
        # An optimizer of Keras 3 lists the weights too, and may lead there faster than the model does.
        info = variable_names.classify_variable(
            ownership.paths.get(key, name) if variable_names.looks_like_optimizer(name) else name,
            full_names.get(key, name),
            entry.shape,
            is_float=entry.dtype.kind == "f" or "float" in entry.dtype.name,
            classes=classes,
            root=root,
            is_of_optimizer=key in state,
        )
        variables.append(
            Tensor(
                name=allocator.unique(name),
                layer=info.layer,
                shape=entry.shape,
                dtype=entry.dtype,
                role=info.role,
                storage=_storage(bundle, entry, key),
                kind=info.kind,
                out_axis=info.out_axis,
                in_axis=info.in_axis,
            )
        )
    return tuple(variables)


def _storage(bundle: Bundle, entry: BundleEntry, key: str) -> Storage:
    if entry.slices:
        nbytes = sum(piece.nbytes for _, piece in bundle.pieces(entry))
        return Storage(key, nbytes, None, nbytes)
    leader = bundle.shared.get(entry.key, entry)
    key = leader.key.decode("utf-8", "backslashreplace")
    return Storage(key, leader.nbytes, bundle.extent(leader), leader.nbytes, bundle.is_big_endian)


def decoder(bundle: Bundle) -> Callable[[Tensor], Array]:
    """A reader of tensors that are stored in slices."""
    by_key = {entry.key.decode("utf-8", "backslashreplace"): entry for entry in bundle.numbers()}

    def decode(tensor: Tensor) -> Array:
        array = np.zeros(tensor.shape, tensor.dtype)
        for location, piece in bundle.pieces(by_key[tensor.storage.key]):
            array[location] = view(
                bundle.extent(piece), dtype=tensor.dtype, shape=piece.shape, big_endian=bundle.is_big_endian
            )
        array.flags.writeable = False
        return array

    return decode


def optimizer(tensors: Iterable[Tensor], full_names: Mapping[str, str]) -> str:
    """The optimizer whose state is among the variables, as far as their names tell."""
    names = [full_names.get(tensor.storage.key, tensor.name) for tensor in tensors if tensor.role == "optimizer"]
    named = next(filter(None, map(variable_names.optimizer_of, names)), "")
    has_state = any("optimizer" in tensor.name.lower() for tensor in tensors if tensor.role == "optimizer")
    return named or ("unknown" if has_state else "")


def copies(bundle: Bundle, full_names: Mapping[str, str]) -> dict[str, str]:
    """Duplicate tensors (same name, shape and checksum as an earlier one), each with its original."""
    seen: dict[tuple[str, tuple[int, ...], int, int], str] = {}
    originals: dict[str, str] = {}
    for entry in bundle.numbers():
        key = entry.key.decode("utf-8", "backslashreplace")
        name = full_names.get(key, "")
        if "/" in name and entry.crc:
            copy = key.removesuffix(VALUE_SUFFIX)
            original = seen.setdefault((name, entry.shape, entry.nbytes, entry.crc), copy)
            if original != copy:
                originals[copy] = original
    return originals


def _root(entries: Iterable[BundleEntry], full_names: Mapping[str, str]) -> str:
    """The name of the model, with which Keras 3 begins the names of what it exports."""
    keys = [entry.key.decode("utf-8", "backslashreplace") for entry in entries]
    if not any(key.startswith(_EXPORT_LISTS) for key in keys):
        return ""
    parts = [full_names.get(key, "").split("/") for key in keys]
    roots = {steps[0] for steps in parts if len(steps) > 2}
    return roots.pop() if len(roots) == 1 else ""
