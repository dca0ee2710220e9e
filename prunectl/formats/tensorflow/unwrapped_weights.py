"""Is every weight of a rebuilt model what it was, times its mask?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from prunectl.errors import WorkError
from prunectl.formats import extents
from prunectl.formats.base import Array, ModelFile, Role
from prunectl.formats.numbers_masked import masked
from prunectl.formats.numbers_masked import pieces as cut
from prunectl.formats.tensorflow import object_graph, same_objects
from prunectl.formats.tensorflow.bundle import read_bundle
from prunectl.formats.tensorflow.variable_names import VALUE_SUFFIX

_GONE = frozenset({Role.MASK, Role.SCHEDULE, Role.OPTIMIZER})


def check(model: ModelFile, rebuilt: Path) -> None:
    """Raise unless a rebuilt model has every weight, bit for bit as plain multiplication says."""
    wrapped, plain = (read_bundle(path / "variables" / "variables.index") for path in (model.path, rebuilt))
    graph, new_graph = object_graph.read(wrapped), object_graph.read(plain)
    pairs, masks = same_objects.pairs(graph, new_graph), same_objects.masks(graph)
    tensors = {tensor.storage.key: tensor for tensor in model.tensors}
    for entry in plain.numbers():
        key = entry.key.decode("utf-8", "backslashreplace")
        old = tensors.pop(pairs.get(key, ""), None)
        if old is None:
            raise WorkError(f"{model.path} came out with a variable that it did not have: {_shown(key)}")
        weight = model.read(old)
        mask = next((tensor for tensor in model.tensors if tensor.storage.key == masks.get(old.storage.key)), None)
        expected = masked(weight, [model.read(mask)] if mask else [])
        extent = plain.extent(entry)
        if (
            entry.shape != old.shape
            or entry.dtype != old.dtype
            or not _same(expected, extents.view(extent, dtype=entry.dtype, shape=entry.shape))
        ):
            raise WorkError(f"{old.name} of {model.path} came out with other numbers than it had")
    if lost := [tensor.name for tensor in tensors.values() if tensor.role not in _GONE]:
        raise WorkError(f"{model.path} came out without {lost[0]}")


def _same(expected: Iterator[Array], found: Array) -> bool:
    return all(one.tobytes() == other.tobytes() for one, (other,) in zip(expected, cut([found]), strict=True))


def _shown(key: str) -> str:
    return key.removesuffix(VALUE_SUFFIX)
