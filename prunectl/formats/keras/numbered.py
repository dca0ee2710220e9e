"""The layout of `model.weights.h5`: paths of attributes, and weights that have only a number."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from prunectl.formats.base import Role, Tensor
from prunectl.formats.keras.config import PRUNED_PREFIX, Layer
from prunectl.formats.keras.hdf5 import Contents, Dataset
from prunectl.formats.keras.numbering import CONTAINERS, doubtful, slots_of
from prunectl.formats.keras.roles import meaning, positional_name, without_cells

_COUNTER = re.compile(r"_\d+$")
_TRAINING = frozenset({"optimizer", "metrics", "_metrics", "compile_metrics"})


@dataclass(frozen=True, slots=True)
class _Owner:
    """The layer that a path leads to."""

    names: tuple[str, ...]
    slug: str
    """The last step of the path, without its number: the class in snake case, or an attribute."""
    layer: Layer | None
    """The layer of the configuration that it is, or that it is inside of."""
    is_layer: bool
    """Whether it is that layer itself."""

    @property
    def shown(self) -> str:
        """What a user would call the layer."""
        if self.layer is not None:
            return self.layer.name.removeprefix(PRUNED_PREFIX)
        return "/".join(without_cells(self.names))

    @property
    def kind(self) -> str:
        """The class of the layer."""
        return self.layer.kind if self.layer is not None else ""


def describe(contents: Contents, config: Mapping[str, Any] | None) -> tuple[Tensor, ...]:
    """Return the weights under the names that Keras gives to variables: `dense/kernel`."""
    slots = slots_of(config, contents.datasets)
    siblings = Counter(found.name.rpartition("/")[0] for found in contents.datasets)
    unclear = doubtful(config, slots, [found.name for found in contents.datasets])
    tensors = [_tensor(found, contents, slots, siblings, unclear) for found in contents.datasets]
    repeated = Counter(tensor.name for tensor in tensors)
    return tuple(
        replace(tensor, name=found.name) if repeated[tensor.name] > 1 else tensor
        for tensor, found in zip(tensors, contents.datasets, strict=True)
    )


def notes(tensors: Iterable[Tensor]) -> tuple[str, ...]:
    """Say it where weights have the names of folders, for nobody knows whose they are."""
    if not any(tensor.name.startswith(tuple(f"{one}/" for one in CONTAINERS)) for tensor in tensors):
        return ()
    return (
        "Its weights do not fit the layers of its configuration by number and shape: they keep their paths for names.",
    )


def _tensor(
    found: Dataset,
    contents: Contents,
    slots: Mapping[str, Layer],
    siblings: Mapping[str, int],
    unclear: frozenset[str],
) -> Tensor:
    steps = found.name.split("/")
    if steps[0] in _TRAINING or "vars" not in steps:
        role = Role.OPTIMIZER if steps[0] in _TRAINING else Role.OTHER
        return Tensor(found.name, "/".join(steps[:-1]), found.shape, found.dtype, role, found.storage)
    owner = _owner(steps[: steps.index("vars")], contents, slots, unclear)
    index = int(steps[-1]) if steps[-1].isdecimal() else 0
    settings = owner.layer.config if owner.layer is not None and owner.is_layer else {}
    leaf = positional_name(owner.slug, index, siblings["/".join(steps[:-1])], found.shape, settings)
    what = meaning(leaf, owner.kind, found.shape, is_float=found.dtype.kind not in "iub")
    return Tensor(
        name="/".join((*owner.names, leaf)),
        layer=owner.shown,
        shape=found.shape,
        dtype=found.dtype,
        role=what.role,
        storage=found.storage,
        kind=owner.kind,
        out_axis=what.out_axis,
        in_axis=what.in_axis,
    )


def _owner(steps: list[str], contents: Contents, slots: Mapping[str, Layer], unclear: frozenset[str]) -> _Owner:
    names: list[str] = []
    layer, is_layer = None, False
    for end in range(1, len(steps) + 1):
        path = "/".join(steps[:end])
        said = contents.attribute(f"{path}/vars", "name")
        is_layer = path in slots
        if is_layer:
            layer = slots[path]
            names.append(layer.name)
        elif isinstance(said, str):
            names.append(said)
        elif steps[end - 1] not in CONTAINERS or path in unclear:
            names.append(steps[end - 1])
    slug = _COUNTER.sub("", steps[-1]) if steps else ""
    return _Owner(tuple(name.removeprefix(PRUNED_PREFIX) for name in names) or ("",), slug, layer, is_layer)
